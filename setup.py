"""The compiled sampler; everything else is in pyproject.toml."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "emlocal.sampling._fused",
            ["emlocal/sampling/_fused.c"],
            depends=["emlocal/sampling/_fused_row.h", "emlocal/sampling/_fused_steps.h"],
            # comparisons need not raise floating point exceptions: they become vector masks
            extra_compile_args=["-O3", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"],
            optional=True,  # without GCC or clang numpy does the work
        )
    ]
)
