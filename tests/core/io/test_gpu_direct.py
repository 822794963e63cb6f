"""cuFile by a library that stands in for it: the calls, in order, and what becomes of their errors."""

from __future__ import annotations

import ctypes
import errno
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from ds_core import report
from ds_core.io import GpuDirect, GpuDirectMissing, IoError

# The declarations are those of NVIDIA's cufile.h, version 1.0 and later.
LIBRARY = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

typedef struct { int err; int cu_err; } CUfileError_t;
typedef void *CUfileHandle_t;
typedef struct { int type; union { int fd; void *handle; } handle; const void *fs_ops; } CUfileDescr_t;

static char text[1 << 16];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
int open_error = 0, register_error = 0;
long long fail_with = 0;  /* the next transfer returns this */
int fail_errno = 0;
size_t at_most = 1 << 30;

static void note(const char *line) {
  pthread_mutex_lock(&lock);
  strncat(text, line, sizeof text - strlen(text) - 1);
  pthread_mutex_unlock(&lock);
}
const char *calls(void) { return text; }

CUfileError_t cuFileDriverOpen(void) {
  note("driver_open\n");
  CUfileError_t e = {open_error, 0};
  return e;
}
CUfileError_t cuFileDriverClose(void) { note("driver_close\n"); CUfileError_t e = {0, 0}; return e; }
CUfileError_t cuFileHandleRegister(CUfileHandle_t *out, CUfileDescr_t *d) {
  CUfileError_t e = {register_error, register_error ? 7 : 0};
  if (d->type != 1 || d->fs_ops != NULL) e.err = 5022;
  int *fd = malloc(sizeof *fd);
  *fd = d->handle.fd;
  *out = fd;
  note("register\n");
  return e;
}
void cuFileHandleDeregister(CUfileHandle_t h) { note("deregister\n"); free(h); }

static ssize_t transfer(int write, CUfileHandle_t h, char *base, size_t size, off_t at, off_t in_base) {
  char line[128];
  snprintf(line, sizeof line, "%s %zu at %lld from %lld\n", write ? "write" : "read", size, (long long)at,
           (long long)in_base);
  note(line);
  if (fail_with) { ssize_t r = fail_with; fail_with = 0; errno = fail_errno; return r; }
  if (size > at_most) size = at_most;
  /* through a buffer, since the descriptor may have O_DIRECT: by its name without */
  char name[64];
  snprintf(name, sizeof name, "/proc/self/fd/%d", *(int *)h);
  FILE *f = fopen(name, write ? "r+b" : "rb");
  if (!f) return -1;
  fseeko(f, at, SEEK_SET);
  ssize_t n = write ? fwrite(base + in_base, 1, size, f) : fread(base + in_base, 1, size, f);
  fclose(f);
  return n;
}
ssize_t cuFileRead(CUfileHandle_t h, void *b, size_t n, off_t at, off_t in) { return transfer(0, h, b, n, at, in); }
ssize_t cuFileWrite(CUfileHandle_t h, const void *b, size_t n, off_t at, off_t in) {
  return transfer(1, h, (char *)b, n, at, in);
}
"""


@pytest.fixture
def library(tmp_path: Path) -> ctypes.CDLL:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to build the library that stands in for cuFile")
    source, path = tmp_path / "cufile.c", tmp_path / "libcufile_stand_in.so"
    source.write_text(LIBRARY)
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(path), str(source)], check=True)
    loaded = ctypes.CDLL(str(path))
    loaded.calls.restype = ctypes.c_char_p
    return loaded


def calls(library: ctypes.CDLL) -> list[str]:
    return library.calls().decode().splitlines()


def put(library: ctypes.CDLL, kind: type[ctypes._SimpleCData], name: str, value: int) -> None:
    kind.in_dll(library, name).value = value


def test_bytes_go_by_the_calls_of_cufile(library: ctypes.CDLL, tmp_path: Path) -> None:
    direct = GpuDirect(library=library._name, device_type="cpu")
    x = torch.arange(5000, dtype=torch.float32)
    path = tmp_path / "x"
    with direct.open(path, create=True) as file:
        assert file.write(x, offset=4096).result() == 20_000
    assert path.read_bytes()[4096:] == x.numpy().tobytes()
    put(library, ctypes.c_size_t, "at_most", 8192)
    y = torch.zeros_like(x)
    version = y._version
    with direct.open(path, read_only=True) as file:
        assert file.read(y, offset=4096).result() == 20_000
    assert torch.equal(x, y) and y._version > version
    direct.close()
    assert calls(library) == [
        "driver_open",
        "register",
        "write 20000 at 4096 from 0",
        "deregister",
        "register",
        "read 20000 at 4096 from 0",
        "read 11808 at 12288 from 8192",
        "read 3616 at 20480 from 16384",
        "deregister",
        "driver_close",
    ]


def test_many_operations_run_at_once_and_closing_waits(library: ctypes.CDLL, tmp_path: Path) -> None:
    direct = GpuDirect(library=library._name, device_type="cpu", num_threads=4)
    parts = [torch.full((1000,), float(i)) for i in range(20)]
    file = direct.open(tmp_path / "x", create=True)
    (tmp_path / "x").write_bytes(bytes(80_000))
    futures = [file.write(part, offset=i * 4000) for i, part in enumerate(parts)]
    file.close()
    assert all(future.done() and future.result() == 4000 for future in futures)
    assert (tmp_path / "x").read_bytes() == torch.cat(parts).numpy().tobytes()
    with pytest.raises(ValueError, match="the file is closed"):
        file.read(parts[0])
    direct.close()


def test_errors_name_file_offset_and_what_was_done(library: ctypes.CDLL, tmp_path: Path) -> None:
    direct = GpuDirect(library=library._name, device_type="cpu")
    path = tmp_path / "x"
    path.write_bytes(bytes(1000))
    file = direct.open(path)
    y = torch.zeros(500)
    with pytest.raises(
        IoError, match=r"2000 bytes at offset 0, 1000 bytes of them done.*: the file has 1000"
    ) as raised:
        file.read(y).result()
    assert raised.value.errno == errno.ENODATA and raised.value.filename == str(path)
    put(library, ctypes.c_longlong, "fail_with", -1)
    put(library, ctypes.c_int, "fail_errno", errno.ENOSPC)
    with pytest.raises(
        IoError, match=r"write of 2000 bytes at offset 64, .* Free space on this file system"
    ) as raised:
        file.write(y, 64).result()
    assert raised.value.errno == errno.ENOSPC and raised.value.offset == 64
    put(library, ctypes.c_longlong, "fail_with", -5012)
    with pytest.raises(IoError, match="error 5012 of cuFile"):
        file.write(y).result()
    put(library, ctypes.c_longlong, "fail_with", -1)
    put(library, ctypes.c_int, "fail_errno", errno.EINTR)
    assert file.write(y).result() == 2000, "interrupted, and called again"
    file.close()
    put(library, ctypes.c_int, "register_error", 5030)
    with pytest.raises(
        IoError, match="cuFileHandleRegister: error 5030 of cuFile, error 7 of the GPU's driver"
    ):
        direct.open(path)
    with pytest.raises(IoError, match="No such file"):
        direct.open(tmp_path / "none" / "x")
    direct.close()


def test_a_tensor_elsewhere_is_refused(library: ctypes.CDLL, tmp_path: Path) -> None:
    direct = GpuDirect(library=library._name, device_type="meta")
    with direct.open(tmp_path / "x", create=True) as file, pytest.raises(ValueError, match="tensors on meta"):
        file.write(torch.zeros(3))
    direct.close()
    if not torch.accelerator.is_available():
        with pytest.raises(GpuDirectMissing, match="torch sees no GPU"):
            GpuDirect(library=library._name)


def test_without_the_library_or_its_driver_it_is_missing(library: ctypes.CDLL) -> None:
    with pytest.raises(
        GpuDirectMissing, match=r"libnone\.so cannot be used .*: install NVIDIA's GPUDirect Storage"
    ):
        GpuDirect(library="libnone.so", device_type="cpu")
    put(library, ctypes.c_int, "open_error", 5001)
    with pytest.raises(GpuDirectMissing, match=r"cuFileDriverOpen: error 5001 of cuFile: .* gdscheck"):
        GpuDirect(library=library._name, device_type="cpu")
    assert "\nGPUDirect        libcufile" in report.text()
