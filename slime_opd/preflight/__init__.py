"""What is found out about a run before it starts: options against this machine, files, data, teacher, memory."""
