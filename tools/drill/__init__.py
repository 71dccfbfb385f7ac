"""The fault drill: kill every kind of process of real training runs, and check what is left and what continues.

kinds      what is killed, how, in which phase of a run, and what the run must then do
plan       kinds, stacks and phases drawn from a seed
stacks     the small training runs that are put through it, and the files they start from
processes  the processes and shared memory of a run, by a mark in their environment
attempt    one start of a run's command: its output, its metrics, the moments at which it is killed
lineage    kills and restarts of one command until it has finished
steps      which steps a start has lost or done twice
results    a kill's outcome, and the table of all
"""
