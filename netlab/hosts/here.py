"""`python -m netlab.hosts.here`: netlab's command for the part of a lab that lives here.

Where a machine is a node of a lab that was brought up from that same machine, the command would
otherwise be sent to the node again.
"""

import os

from netlab.cli import main

os.environ["NETLAB_HERE"] = "1"
main()
