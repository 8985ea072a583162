"""What a machine has and what it lacks: facts, checks, and the lines that mend what is missing."""
