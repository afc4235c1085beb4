"""Devices and processes, signals, mistakes of the user, what is seen while work runs. Needs no other room."""
