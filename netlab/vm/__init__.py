"""A second kernel: commands in a small virtual machine that sees this machine's files."""
