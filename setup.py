"""The one C extension; everything else about the package stands in pyproject.toml."""

from setuptools import Extension, setup

BINDING = ("module", "module_memory", "module_device", "module_run")  # the only ones that know Python
KERNELS = ("checksum", "copy", "cuda", "memory", "pool", "reader", "run", "shared", "stream")

setup(
    ext_modules=[
        Extension(
            "weightcache._engine",
            sources=[f"ext/{name}.c" for name in BINDING + KERNELS],
            depends=[f"ext/{name}.h" for name in ("module", *KERNELS)],
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            py_limited_api=True,
            extra_compile_args=["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror"],
            extra_link_args=["-pthread", "-Wl,-Bsymbolic"],
        )
    ]
)
