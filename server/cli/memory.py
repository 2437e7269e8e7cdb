"""Huge memory pages for the server's process, which only its start can ask for."""

import os
import platform
import sys

TUNABLE = "glibc.malloc.hugetlb=1"


def with_huge_pages() -> None:
    """Replace this process by the same command with huge pages, where glibc can give them.

    Weights are read from end to end at every step; in pages of 4 KiB the processor spends part of
    that on looking pages up. Measured on the demonstration model (two cores, 16 rows): a decode
    step takes 5 to 10 % less, prefill 5 to 15 %. The C library reads the setting when a process
    starts; one who sets GLIBC_TUNABLES himself is left alone.
    """
    if "GLIBC_TUNABLES" in os.environ or platform.libc_ver()[0] != "glibc":
        return
    os.environ["GLIBC_TUNABLES"] = TUNABLE
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
