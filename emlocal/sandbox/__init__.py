"""Code that a model wrote, run so that it can do no harm (docs/evaluation.md says what that means).

- `run`: starts a fresh interpreter for a program, and says what came of it
- `inside`: what that interpreter does before the program; runs by itself, without emlocal
- `landlock`, `seccomp`: the two locks of Linux that it turns; `seccomp` lists the system calls that are
  left to a program, with reasons
"""
