"""Layouts shown equal to one rank, on the CPU, before a cluster is paid for."""
