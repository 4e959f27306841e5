"""What the makefile runs beside the packages."""
