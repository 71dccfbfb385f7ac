"""The commands of `python -m slime_opd`: one file each, with a line of help and `run(argv)`."""
