"""The x86-64 part of a machine: the memory map, the boot, ACPI tables and CPUID."""
