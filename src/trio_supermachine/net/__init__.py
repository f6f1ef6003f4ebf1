"""Networking without a network card: connections between host and guest, over vsock."""
