"""What is read of NVIDIA's ncu, and what is said of it. Run: pytest tests/systems/test_gpu_counters.py"""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from experiments.gpu import counters, ncu, pretended_ncu
from experiments.gpu.processes import end
from moa.kernels.triton import by_expert, decode, routed, thin

LABELS = {
    "gpu__time_duration.sum": "seconds",
    "dram__bytes_read.sum": "bytes read",
    "lts__t_sector_hit_rate.pct": "hits",
}
PAGE = """==PROF== Connected to process 4711 (/usr/bin/python3)
==PROF== Profiling "gram_kernel" - 0: 0%....50%....100% - 9 passes
"ID","Kernel Name","Block Size","dram__bytes_read.sum","gpu__time_duration.sum","lts__t_sector_hit_rate.pct"
"","","","Mbyte","{unit}","%"
"0","gram_kernel","(128, 1, 1)","1,067.5","{time}","51.25"
"1","void cutlass::gemm<float, 4>(int, float)","(128, 1, 1)","(!) n/a","2","n/a"
"2","cut off","(128, 1, 1)","1,0"""
MEMORY = {"seconds": 1e-3, "bytes read": 1.5e9, "bytes written": 0.3e9, "tensor %": 10.0, "memory %": 10.0}


TIMES = [("ns", "1,234,500"), ("nsecond", "1234500"), ("us", "1,234.5"), ("usecond", "1,234.50"), ("ms", "1.2345"),
         ("msecond", "1.2345"), ("s", "0.0012345"), ("second", "1.2345e-3")]  # fmt: skip


@pytest.mark.parametrize("unit, time", TIMES)
def test_a_raw_page_is_read_in_base_units(unit, time):
    first, second = ncu.launches(PAGE.format(unit=unit, time=time), LABELS)
    assert first[0] == "gram_kernel"
    assert first[1] == pytest.approx({"seconds": 1.2345e-3, "bytes read": 1067.5e6, "hits": 51.25})
    assert second[0] == "void cutlass::gemm<float, 4>" and list(second[1]) == ["seconds"]


@pytest.mark.parametrize("unit, by", [("Gbyte/second", 1e9), ("Tbyte/s", 1e12), ("Kbyte/block", 1e3), ("byte", 1.0),
                                      ("register/thread", 1.0), ("inst", 1.0), ("%", 1.0), ("", 1.0), ("Ghz", 1e9),
                                      ("parsec", None), ("xbyte", None)])  # fmt: skip
def test_units(unit, by):
    assert ncu.factor(unit) == by


def test_a_page_that_is_not_there_has_no_launches():
    assert ncu.launches("==ERROR== ERR_NVGPUCTRPERM\n", LABELS) == []
    assert ncu.launches('"ID","Kernel Name"\n', LABELS) == []


def test_the_first_name_that_ncu_knows_is_asked_for():
    assert "dram__bytes_read.sum" in ncu.chosen(())
    found = ncu.chosen({"dram__bytes_op_read", "gpu__time_duration"})
    assert {name: label for name, label in found.items() if not name.startswith("launch__")} == {
        "gpu__time_duration.sum": "seconds",
        "dram__bytes_op_read.sum": "bytes read",
    }
    assert found["launch__registers_per_thread"] == "registers"
    without = ncu.chosen((), {"dram__bytes_read.sum", "gpu__time_duration.sum"})
    assert without["dram__bytes_op_read.sum"] == "bytes read" and "seconds" not in without.values()


@pytest.mark.parametrize("way", pretended_ncu.WAYS)
def test_ways_to_fail_are_said(way):
    found = pretended_ncu.tried(way)
    assert found["holds"], found


@pytest.mark.parametrize(
    "changed, said",
    [
        ({}, "memory bounds it"),
        ({"bytes read": 1.499e9}, "latency bounds it"),
        ({"bytes read": 1.499e9, "tensor %": 60.0}, "the tensor cores bound it"),
        ({"bytes read": 1.499e9, "tensor %": 59.9}, "latency bounds it"),
        ({"tensor %": 61.0}, "the tensor cores bound it"),
        ({"bytes read": 0.0, "memory %": 60.0}, "the caches bound it, not the memory behind them"),
        ({"bytes read": 0.0, "memory %": 59.9}, "latency bounds it"),
        ({"bytes read": 0.0, "waves": 0.99, "warps %": 5.0}, "too few blocks bound it: 0.99 of what the device holds"),
        ({"bytes read": 0.0, "waves": 1.0, "warps %": 25.0}, "latency bounds it"),
        ({"bytes read": 0.0, "warps %": 24.9, "registers": 168.0},
         "latency bounds it, with too few warps to hide it (168 registers)"),
        ({"bytes read": 0.0, "waits for a barrier": 3.0, "waits for global memory": 2.0},
         "latency bounds it: a warp mostly waits for a barrier"),
    ],
)  # fmt: skip
def test_what_bounds_a_kernel(changed, said):
    """A copy moves 3 TB/s: 60 % of it are 1.8 GB in a millisecond."""
    assert counters.bound({**MEMORY, **changed}, 3e12) == said


def test_without_a_copy_the_share_of_the_peak_is_taken():
    assert counters.share({"DRAM %": 59.9}, None) == pytest.approx(0.599)
    assert counters.bound({**MEMORY, "DRAM %": 60.0}, None) == "memory bounds it"
    assert counters.bound({**MEMORY, "DRAM %": 59.9}, None) == "latency bounds it"
    assert counters.bound({"seconds": 1.0}, 3e12) == "what bounds it was not counted"
    assert counters.speed({**MEMORY, "seconds": 0.0}) is None


def test_the_copy_is_the_one_of_the_table():
    assert counters.copied({"ceilings": {"found": {"times": {"copy of 2 GiB": {"GB/s": 3000.0}}}}}) == 3e12
    assert counters.copied({}) is None and counters.copied({"ceilings": {"error": "out of memory"}}) is None


def test_the_three_slowest_are_summed_up():
    launches = [(name, {**MEMORY, "seconds": 1e-3 * (n + 1)}) for n, name in enumerate(counters.KERNELS)]
    launches += [("nvjet_tst", {**MEMORY, "seconds": 1.0}), ("gram_kernel", {**MEMORY, "seconds": 9.0})]
    found = counters.summary(launches[1:], ["launch__waves_per_multiprocessor"], 3e12)
    slowest = [note.split(":")[0] for note in found["notes"][:3]]
    assert slowest == ["grouped gram, adding its chunks", "grouped gram", "grouped expand, adding slots"]
    assert found["notes"][3:] == [
        "not counted, for want of time: shrink",
        "ncu does not have launch__waves_per_multiprocessor here",
    ]
    shown = found["times"]["gram"]
    assert shown["median_ms"] == pytest.approx(5.0) and shown["GB/s"] == pytest.approx(360.0)
    assert shown["of a copy"] == pytest.approx(0.12)
    assert "13,000 µs, 138 GB/s, 0.0462 of a copy, tensor cores 10.0 % busy: latency bounds it" in found["notes"][0]


def test_every_kernel_is_counted():
    """A kernel that is new or has another name is seen; a whole layer's launches are those of the stand-in's page."""
    modules = (thin, routed, decode, by_expert)
    assert {name for module in modules for name in vars(module) if name.endswith("_kernel")} == set(counters.KERNELS)
    assert set(pretended_ncu.LAUNCHES[:-1]) == set(counters.KERNELS)


def test_a_process_ends_with_those_below_it():
    script = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{script}; print(p.pid, flush=True); p.wait()"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    below = psutil.Process(int(process.stdout.readline()))
    with process.stdout:
        end(process)
    psutil.wait_procs([below], timeout=10)
    assert not below.is_running() or below.status() == psutil.STATUS_ZOMBIE
