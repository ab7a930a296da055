#pragma once
#include <stddef.h>

// Runs task(context, scratch, i) for every i in [0, count) on up to `threads` threads, the caller among them, each with
// `scratch_bytes` of its own, aligned to 64 bytes and uninitialised. Returns 0, or 1 where memory ran out.
typedef void task_fn(const void *context, void *scratch, ptrdiff_t i);
int pool_run(task_fn *task, const void *context, ptrdiff_t count, ptrdiff_t threads, size_t scratch_bytes);
