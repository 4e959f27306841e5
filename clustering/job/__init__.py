"""The stand-alone job: what it reads and writes, and where it goes on."""
