"""What any program needs from the machine: devices, threads, memory, processes, atomic files."""
