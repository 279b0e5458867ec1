"""What run.py puts together: checks, models, objective, memory, schedule, records. Imports every room but retrieval."""
