"""The fault drill: kill every kind of process of real training runs, and check what is left and that the runs resume.

kinds      kinds of kills: the process, the signal, the phase of the run, and the expected outcome
plan       random choice of kinds, stacks and phases from a seed
stacks     the small training runs, and their input files
processes  the processes and shared memory of a run, identified by a mark in their environment
attempt    one start of a run's command: its output, its metrics, the moments for kills
lineage    kills and restarts of one command until the run is finished
judge      the checks of a run's behaviour after a kill
steps      steps that a start has lost or done twice
weights    comparison of the final checkpoints of two runs
results    the result of a kill, and the table of all results
campaign   a whole drill
terminal   a command in a terminal of its own
"""
