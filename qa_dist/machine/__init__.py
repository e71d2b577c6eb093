"""This machine: packages against the tested set, devices, disks, limits."""
