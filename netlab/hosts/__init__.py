"""Nodes on machines of their own, reached through execnet."""
