"""What is tried on a job's own ranks before the job starts; ``torchtitan_upipe.check`` runs it."""
