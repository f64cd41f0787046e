"""The one C extension; everything else about the package stands in pyproject.toml."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "weightcache._engine",
            sources=["ext/module.c", "ext/memory.c", "ext/reader.c"],
            depends=["ext/memory.h", "ext/reader.h"],
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            py_limited_api=True,
            extra_compile_args=["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror"],
        )
    ]
)
