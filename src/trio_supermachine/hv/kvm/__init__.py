"""The KVM engine: machines that this process runs itself.

The files, from the kernel's interface upwards: ``_build`` compiles the binding, ``ioctl``, ``api``
and ``vcpu_handle`` call it by name; ``probe`` tells whether a host is fit; ``state`` and
``state_format`` save and load vCPUs; ``vcpu`` is a vCPU's thread, ``device`` a virtio device with
its task, ``routes`` and ``memory`` belong to the machine; ``board`` joins all hardware, ``machine``
gives it a life, and ``engine`` opens machines. ``x86/`` is what is particular to that architecture.
"""
