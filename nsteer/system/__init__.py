"""What all rooms use of the machine: files, hosts, the hub, memory, and how values are hashed."""
