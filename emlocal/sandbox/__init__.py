"""A sandbox for code that a model wrote (docs/evaluation.md says what it does and does not prevent).

- `run`: starts a new interpreter for a program, and returns the result
- `inside`: what that interpreter does before the program; it runs by itself, without emlocal
- `landlock`, `seccomp`: the two Linux locks that it uses; `seccomp` lists the system calls that a program may
  make, with reasons
"""
