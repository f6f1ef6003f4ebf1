"""The KVM engine: so far the probe that tells whether a host is fit for it."""
