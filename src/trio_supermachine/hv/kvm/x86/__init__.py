"""What is particular to x86-64: the memory map, the boot, ACPI tables and CPUID."""
