// Fibers for cuda_runtime.h of this folder, and what torch's CUDA library offers, for tensors on the CPU.

#include <setjmp.h>
#include <torch/csrc/stable/c/shim.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "cuda_runtime.h"

alignas(64) double psf_shared_memory[8192];
dim3 blockIdx, gridDim;

namespace cuda_shim {

unsigned thread;

namespace {

constexpr size_t kStack = 64 << 10;
constexpr unsigned kMost = 1024;
constexpr unsigned kGuard = 0x5afe5afe;

enum class State { ready, waits_for_block, waits_for_warp, done };

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  jmp_buf place;  // swapcontext would make two system calls each time
  bool started = false;
  State state = State::done;
};

std::vector<Fiber> fibers;
jmp_buf scheduler;
ucontext_t fiber_context;
const std::function<void()>* running;
uint64_t slots[2][kMost];
unsigned round_of[kMost / 32];

void run_fiber() {
  (*running)();
  fibers[thread].state = State::done;
  _longjmp(scheduler, 1);
}

void resume(unsigned index) {
  thread = index;
  Fiber& fiber = fibers[index];
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  getcontext(&fiber_context);
  fiber_context.uc_stack.ss_sp = fiber.stack.get();
  fiber_context.uc_stack.ss_size = kStack;
  fiber_context.uc_link = nullptr;
  makecontext(&fiber_context, run_fiber, 0);
  setcontext(&fiber_context);
}

void wait(State state) {
  Fiber& fiber = fibers[thread];
  fiber.state = state;
  if (_setjmp(fiber.place) == 0) _longjmp(scheduler, 1);
}

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "cuda_shim: %s in block (%u, %u)\n", what, blockIdx.x, blockIdx.y);
  std::abort();
}

}  // namespace

void run_block(unsigned threads, size_t shared_bytes, const std::function<void()>& kernel) {
  if (threads % 32 != 0 || threads > kMost || shared_bytes + 8 > sizeof psf_shared_memory) fail("impossible launch");
  if (fibers.empty()) fibers.resize(kMost);
  running = &kernel;
  std::memset(psf_shared_memory, 0xff, shared_bytes);  // NaN
  char* const guard = reinterpret_cast<char*>(psf_shared_memory) + shared_bytes;
  std::memcpy(guard, &kGuard, sizeof kGuard);
  for (unsigned i = 0; i < threads; ++i) {
    fibers[i].started = false;
    fibers[i].state = State::ready;
  }
  for (unsigned left = threads; left > 0;) {
    bool moved = false;
    for (unsigned first = 0; first < threads; first += 32) {
      for (;;) {  // one warp for as long as its threads only wait for each other
        unsigned waiting = 0, ran = 0;
        for (unsigned i = first; i < first + 32; ++i) {
          if (fibers[i].state != State::ready) continue;
          resume(i);
          ++ran;
        }
        for (unsigned i = first; i < first + 32; ++i) waiting += fibers[i].state == State::waits_for_warp;
        moved |= ran > 0;
        if (waiting == 0) break;
        if (waiting < 32) fail("a shuffle that not all threads of a warp reach");
        ++round_of[first / 32];
        for (unsigned i = first; i < first + 32; ++i) fibers[i].state = State::ready;
      }
    }
    unsigned done = 0, waiting = 0;
    for (unsigned i = 0; i < threads; ++i) {
      done += fibers[i].state == State::done;
      waiting += fibers[i].state == State::waits_for_block;
    }
    left = threads - done;
    if (left > 0 && waiting < threads) fail("a __syncthreads that not all threads reach");
    if (!moved) fail("no thread can go on");
    if (left > 0) {
      for (unsigned i = 0; i < threads; ++i) fibers[i].state = State::ready;
    }
  }
  if (std::memcmp(guard, &kGuard, sizeof kGuard) != 0) fail("a write behind the shared memory");
}

void wait_for_block() { wait(State::waits_for_block); }

const uint64_t* exchange(uint64_t value) {
  uint64_t* const now = slots[round_of[thread / 32] % 2];
  now[thread] = value;
  wait(State::waits_for_warp);
  return now + thread / 32 * 32;
}

}  // namespace cuda_shim

extern "C" {

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

AOTITorchError torch_c10_cuda_check_msg(int32_t, const char*, const char*, uint32_t, bool, char** message) {
  *message = nullptr;
  return 0;
}
void torch_c10_cuda_free_error_msg(char*) {}

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return 0;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }
}
