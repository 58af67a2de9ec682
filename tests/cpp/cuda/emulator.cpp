#include "cuda/emulator.h"

#include <algorithm>
#include <map>
#include <memory>
#include <new>
#include <numeric>
#include <random>
#include <string>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// switch_stack(save, load): keeps the callee-saved registers on the old stack, leaves its address in *save, and goes on
// where the stack `load` was left.
extern "C" void diffqkv_switch_stack(void** save, void* load);
asm(R"(
.text
.globl diffqkv_switch_stack
.type diffqkv_switch_stack, @function
diffqkv_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size diffqkv_switch_stack, .-diffqkv_switch_stack
)");

namespace diffqkv::device::emulator {

Place place;
Counts counts;
const std::vector<float> halves = [] {
  std::vector<float> x(65536);
  for (size_t i = 0; i < x.size(); ++i) {
    const uint16_t bits = static_cast<uint16_t>(i);
    _Float16 half;
    std::memcpy(&half, &bits, 2);
    x[i] = float(half);
  }
  return x;
}();

namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr int kMaxThreads = 1024;

struct Copy {
  void* target;
  const void* source;  // null: zeros
  size_t bytes;
};

struct Fiber {
  enum State { ready, waiting, polling, done } state = done;
  std::unique_ptr<char[]> stack;
  void* stack_pointer = nullptr;
  std::vector<std::vector<Copy>> groups;  // of copies under way; the last one is still open
};

struct Warp {
  const char* name = nullptr;  // of the operation that its lanes come to
  void* arguments[32] = {};
  int arrived = 0;
};

struct BarrierState {
  int arrivals = 0, pending = 0;
  int64_t bytes = 0;  // announced and not yet come
  int phase = 0;      // parity of the current one
  std::vector<Copy> copies;
};

struct Machine {
  std::vector<Fiber> fibers{kMaxThreads};
  std::vector<Warp> warps{kMaxThreads / 32};
  std::map<void*, BarrierState> barriers;
  std::vector<char> shared_storage;
  char* shared = nullptr;
  int64_t shared_bytes = 0;
  int threads = 0, alive = 0, at_barrier = 0;
  bool any = false, any_result = false;
  int64_t events = 0;  // whatever can let a polling fiber go on
  std::string error;
  void (*body)(void*, char*) = nullptr;
  void* context = nullptr;
  void* main_stack = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  const void* main_bottom = nullptr;
  size_t main_size = 0;
#endif
};
Machine m;

Fiber& current() { return m.fibers[static_cast<size_t>(place.thread)]; }

void to_main(bool finished) {
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(finished ? nullptr : &fake, m.main_bottom, m.main_size);
#endif
  void* unused;
  diffqkv_switch_stack(finished ? &unused : &current().stack_pointer, m.main_stack);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void wait_as(Fiber::State state) {
  current().state = state;
  to_main(false);
}

void release_block() {
  m.any_result = m.any;
  m.any = false;
  m.at_barrier = 0;
  ++m.events;
  for (int t = 0; t < m.threads; ++t)
    if (m.fibers[static_cast<size_t>(t)].state == Fiber::waiting) m.fibers[static_cast<size_t>(t)].state = Fiber::ready;
}

extern "C" void diffqkv_fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &m.main_bottom, &m.main_size);
#endif
  m.body(m.context, m.shared);
  current().state = Fiber::done;
  --m.alive;
  ++m.events;
  if (m.alive > 0 && m.at_barrier == m.alive) release_block();
  to_main(true);
}

void start(Fiber& fiber) {
  if (!fiber.stack) fiber.stack = std::make_unique<char[]>(kStackBytes);
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(fiber.stack.get(), kStackBytes);  // an emulation that failed has left its frames
#endif
  auto top = reinterpret_cast<uintptr_t>(fiber.stack.get() + kStackBytes) / 16 * 16;
  auto* slots = reinterpret_cast<void**>(top) - 8;  // six registers, the address to go to, and a place for alignment
  std::fill_n(slots, 8, nullptr);
  slots[6] = reinterpret_cast<void*>(&diffqkv_fiber_main);
  fiber.stack_pointer = slots;
  fiber.state = Fiber::ready;
  fiber.groups.assign(1, {});
}

void resume(int t) {
  place.thread = t;
  Fiber& fiber = m.fibers[static_cast<size_t>(t)];
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber.stack.get(), kStackBytes);
#endif
  diffqkv_switch_stack(&m.main_stack, fiber.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  if (!m.error.empty()) throw std::runtime_error(m.error);
}

void perform(const std::vector<Copy>& copies) {
  for (const Copy& copy : copies) {
    if (copy.source != nullptr)
      std::memcpy(copy.target, copy.source, copy.bytes);
    else
      std::memset(copy.target, 0, copy.bytes);
  }
}

BarrierState& state_of(void* barrier) {
  const auto found = m.barriers.find(barrier);
  if (found == m.barriers.end()) fail("a barrier that was not initialised");
  return found->second;
}

void end_phase_if_complete(BarrierState& b) {
  if (b.pending > 0 || b.bytes != 0) return;
  b.phase ^= 1;
  b.pending = b.arrivals;
  ++m.events;
}

void run_block(const std::vector<int>& warp_order, const std::vector<int>& lane_order) {
  std::memset(m.shared, 0xff, static_cast<size_t>(m.shared_bytes));
  m.barriers.clear();
  m.alive = m.threads;
  m.at_barrier = 0;
  m.any = false;
  for (int t = 0; t < m.threads; ++t) start(m.fibers[static_cast<size_t>(t)]);
  for (Warp& warp : m.warps) warp = {};
  while (m.alive > 0) {
    const int64_t before = m.events;
    bool ran = false;
    for (const int w : warp_order) {
      for (bool again = true; again;) {
        again = false;
        for (const int lane : lane_order) {
          Fiber& fiber = m.fibers[static_cast<size_t>(32 * w + lane)];
          if (fiber.state == Fiber::ready) {
            resume(32 * w + lane);
            again = ran = true;
          }
        }
      }
      for (const int lane : lane_order)
        if (m.fibers[static_cast<size_t>(32 * w + lane)].state == Fiber::polling) resume(32 * w + lane);
    }
    if (!ran && m.events == before) throw std::runtime_error("emulator: deadlock: threads wait for what never comes");
  }
}

}  // namespace

void fail(const char* what) {
  m.error = std::string("emulator: ") + what + " (block " + std::to_string(place.x) + ", " + std::to_string(place.y) +
            ", " + std::to_string(place.z) + ", thread " + std::to_string(place.thread) + ")";
  to_main(true);
  __builtin_unreachable();
}

void together(const char* name, void* argument, void (*act)(void* const*)) {
  Warp& warp = m.warps[static_cast<size_t>(place.thread / 32)];
  if (warp.arrived > 0 && warp.name != name && std::strcmp(warp.name, name) != 0)
    fail("lanes of a warp at different operations");
  warp.name = name;
  warp.arguments[place.thread % 32] = argument;
  if (++warp.arrived < 32) return wait_as(Fiber::waiting);
  act(warp.arguments);
  warp.arrived = 0;
  ++m.events;
  const int first = place.thread / 32 * 32;
  for (int t = first; t < first + 32; ++t) m.fibers[static_cast<size_t>(t)].state = Fiber::ready;
}

bool sync_block(bool x) {
  if (m.warps[static_cast<size_t>(place.thread / 32)].arrived > 0) fail("lanes of a warp at different operations");
  m.any = m.any || x;
  if (++m.at_barrier < m.alive)
    wait_as(Fiber::waiting);
  else
    release_block();
  return m.any_result;
}

void check_shared(const void* p, int64_t bytes, int64_t alignment, const char* what) {
  const char* at = static_cast<const char*>(p);
  if (at < m.shared || at + bytes > m.shared + m.shared_bytes)
    fail((std::string(what) + ": outside shared memory").c_str());
  if (reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(alignment) != 0)
    fail((std::string(what) + ": misaligned").c_str());
}

void count_matrix(const void* const* rows) {
  int places[8] = {};  // different ones in each bank of 16 bytes
  for (int i = 0; i < 8; ++i) {
    if (std::find(rows, rows + i, rows[i]) == rows + i) ++places[reinterpret_cast<uintptr_t>(rows[i]) / 16 % 8];
  }
  ++counts.matrix_rows;
  counts.matrix_wavefronts += *std::max_element(places, places + 8);
}

void copy_async(void* shared, const void* global, bool valid, int bytes) {
  const size_t size = static_cast<size_t>(bytes);
  check_shared(shared, bytes, bytes, "copy_async");
  if (valid && reinterpret_cast<uintptr_t>(global) % size != 0) fail("copy_async: misaligned source");
  std::memset(shared, 0xff, size);
  current().groups.back().push_back({shared, valid ? global : nullptr, size});
  counts.copied_bytes += bytes;
}
void copy_commit() { current().groups.emplace_back(); }
void copy_wait(int pending) {
  auto& groups = current().groups;
  while (static_cast<int>(groups.size()) - 1 > pending) {
    perform(groups.front());
    groups.erase(groups.begin());
  }
}

void barrier_init(void* barrier, int arrivals) {
  BarrierState& b = m.barriers[barrier];
  b = {};
  b.arrivals = b.pending = arrivals;
}
void barrier_arrive(void* barrier, int64_t bytes) {
  BarrierState& b = state_of(barrier);
  if (b.pending == 0) fail("more arrivals at a barrier than it was made for");
  --b.pending;
  b.bytes += bytes;
  end_phase_if_complete(b);
}
void barrier_wait(void* barrier, int parity) {
  while (true) {
    BarrierState& b = state_of(barrier);
    if (b.phase != parity) return;
    if (!b.copies.empty()) {  // they come now, no earlier
      perform(b.copies);
      for (const Copy& copy : b.copies) b.bytes -= static_cast<int64_t>(copy.bytes);
      b.copies.clear();
      end_phase_if_complete(b);
      continue;
    }
    wait_as(Fiber::polling);
  }
}
void copy_bulk(void* shared, const void* global, int64_t bytes, void* barrier) {
  check_shared(shared, bytes, 16, "copy_bulk");
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0 || bytes % 16 != 0) fail("copy_bulk: misaligned source or size");
  std::memset(shared, 0xff, static_cast<size_t>(bytes));
  state_of(barrier).copies.push_back({shared, global, static_cast<size_t>(bytes)});
  counts.copied_bytes += bytes;
}

void run(void (*body)(void*, char*), void* context, int threads, Grid grid, int64_t shared_bytes, Schedule schedule) {
  if (threads < 32 || threads > kMaxThreads || threads % 32 != 0)
    throw std::runtime_error("emulator: want 32 to 1024 threads, whole warps");
  m.body = body;
  m.context = context;
  m.threads = threads;
  m.error.clear();
  const std::align_val_t alignment{128};
  const auto release = [=](void* p) { ::operator delete(p, alignment); };
  const std::unique_ptr<void, decltype(release)> storage(
      ::operator new(static_cast<size_t>(std::max<int64_t>(shared_bytes, 1)), alignment), release);
  m.shared = static_cast<char*>(storage.get());
  m.shared_bytes = shared_bytes;

  std::vector<int> warps(static_cast<size_t>(threads / 32)), lanes(32);
  std::vector<int64_t> blocks(static_cast<size_t>(grid.x * grid.y * grid.z));
  std::iota(warps.begin(), warps.end(), 0);
  std::iota(lanes.begin(), lanes.end(), 0);
  std::iota(blocks.begin(), blocks.end(), int64_t{0});
  if (schedule == Schedule::reverse) {
    std::reverse(warps.begin(), warps.end());
    std::reverse(lanes.begin(), lanes.end());
    std::reverse(blocks.begin(), blocks.end());
  } else if (schedule == Schedule::shuffled) {
    std::mt19937 random(1);
    std::shuffle(warps.begin(), warps.end(), random);
    std::shuffle(lanes.begin(), lanes.end(), random);
    std::shuffle(blocks.begin(), blocks.end(), random);
  }
  for (const int64_t block : blocks) {
    place.grid = grid;
    place.x = block % grid.x;
    place.y = block / grid.x % grid.y;
    place.z = block / grid.x / grid.y;
    run_block(warps, lanes);
  }
}

}  // namespace diffqkv::device::emulator
