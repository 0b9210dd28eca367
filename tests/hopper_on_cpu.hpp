// In the place of hopper_async.cuh on a CPU: clusters, mbarrier objects, the copies of boxes, and launches. What each
// does is PTX ISA 9.0's text, not what the kernel needs. Copies are done later than issued, in random order; threads
// run in random order too. What the ISA calls undefined, or what is a race, ends the launch with a message.
// After cuda_on_cpu.hpp and hopper.cuh; wgmma_on_cpu.hpp comes next.

#include <cstdarg>
#include <cstdio>
#include <functional>

#define __cluster_dims__(...)
#define __grid_constant__

typedef unsigned long long u64;
struct alignas(64) TensorMap {
  u8 opaque[128];
};

constexpr int MAX_BLOCKS = 2, LINE = 128;  // of a cluster; shared memory is watched by lines of a swizzle's row
constexpr u32 WINDOW = 1024, SHARED_SIZE = 232448;
static int block_threads, cluster_blocks, first_block;
static u8 shared_bytes[MAX_BLOCKS][SHARED_SIZE];

static char failure[512];
static uint64_t random_state;
static long progress;
static std::function<bool()> blocked[MAX_THREADS];

inline void fail(const char *format, ...) {
  const int block = running / block_threads, thread = running % block_threads;
  int at = snprintf(failure, sizeof failure, "block %d, thread %d: ", block, thread);
  va_list list;
  va_start(list, format);
  vsnprintf(failure + at, sizeof failure - at, format, list);
  va_end(list);
  const int self = running;  // -1 if a copy failed
  if (self >= 0) swapcontext(&fibers[self], &scheduler);
}
inline void give_up() { fail("the kernel gave up"); }
inline bool one_in(int n) {
  random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
  return random_state % n == 0;
}
inline void wait_until(std::function<bool()> met) {
  if (met()) return;
  blocked[running] = met;
  yield();
}
inline void let_others() {
  if (one_in(16)) yield();
}

inline int own_block() { return running / block_threads; }
inline Index own_index() { return {(unsigned)(first_block + own_block()), 0, 0}; }
#define blockIdx (own_index())

struct Meeting { int arrived; long done; };
inline void gather(Meeting &meeting, int parties) {
  const long before = meeting.done;
  if (++meeting.arrived == parties) meeting.arrived = 0, meeting.done++, progress++;
  else wait_until([&meeting, before] { return meeting.done > before; });
}
static Meeting of_cluster, of_warps[MAX_THREADS / 32], named[MAX_BLOCKS][16];
static bool alive(int block) {
  for (int t = 0; t < block_threads; t++)
    if (!ended[block * block_threads + t]) return true;
  return false;
}

inline u32 cluster_rank() { return own_block(); }
inline void cluster_sync() { gather(of_cluster, cluster_blocks * block_threads); }
inline void __syncwarp() { gather(of_warps[running / 32], 32); }
inline void sync_threads(u32 barrier, u32 threads) {
  if (barrier > 15 || threads % 32) fail("bar.sync %u, %u", barrier, threads);
  gather(named[own_block()][barrier], threads);
}
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  memcpy(&exchange[running], &value, sizeof value);
  __syncwarp();
  T other;
  memcpy(&other, &exchange[running / 32 * 32 + lane], sizeof other);
  __syncwarp();
  return other;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }

// Registers: threads are launched with what 65536 hold, in eights.
static int pool[MAX_BLOCKS], owned[MAX_THREADS];
template <int COUNT>
void give_registers() {
  static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256, "setmaxnreg");
  if (owned[running] < COUNT) fail("setmaxnreg.dec of %d to %d", owned[running], COUNT);
  pool[own_block()] += owned[running] - COUNT, owned[running] = COUNT, progress++;
}
template <int COUNT>
void take_registers() {
  static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256, "setmaxnreg");
  if (owned[running] > COUNT) fail("setmaxnreg.inc of %d to %d", owned[running], COUNT);
  int &left = pool[own_block()];
  const int more = COUNT - owned[running];
  wait_until([&left, more] { return left >= more; });
  left -= more, owned[running] = COUNT;
}

// Shared memory. A line that a copy wrote must be read before a copy writes it again.
struct Line { bool unread; };
static Line lines[MAX_BLOCKS][SHARED_SIZE / LINE];
static short writers[MAX_BLOCKS][SHARED_SIZE / 16];  // 1 + the thread that wrote there, with no fence for copies since
inline u32 offset_of(u32 address, u32 bytes, u32 alignment) {
  if (address < WINDOW || address - WINDOW + bytes > SHARED_SIZE) fail("no shared memory at %u", address);
  if (address % alignment) fail("address %u is no multiple of %u", address, alignment);
  return address - WINDOW;
}
inline u32 swizzled(u32 address) { return address ^ ((address >> 7 & 7) << 4); }
inline u32 shared_memory() { return WINDOW; }
template <typename T>
T read_shared(u32 address) {
  const u32 at = offset_of(address, sizeof(T), sizeof(T));
  lines[own_block()][at / LINE].unread = false;
  T value;
  memcpy(&value, &shared_bytes[own_block()][at], sizeof(T));
  return value;
}
inline float load_shared(u32 address) { return read_shared<float>(address); }
inline u32 load_shared_pair(u32 address) { return read_shared<u32>(address); }

struct Mbarrier { bool made, fenced, observed; int maker, expected, pending; long bytes, phase; };
static Mbarrier barriers[MAX_BLOCKS][SHARED_SIZE / 8];
inline Mbarrier &barrier_of(int block, u32 address) {
  Mbarrier &found = barriers[block][offset_of(address, 8, 8) / 8];
  if (!found.made) fail("no barrier at %u", address);
  if (!found.fenced && (running < 0 || found.maker != running)) fail("barrier %u had no fence", address);
  return found;
}
inline void settle(Mbarrier &barrier) {
  progress++;
  if (barrier.pending || barrier.bytes) return;
  barrier.pending = barrier.expected, barrier.phase++, barrier.observed = false;
}
inline void arrive(int block, u32 address) {
  if (!alive(block)) fail("arrived at a block that has ended");
  Mbarrier &barrier = barrier_of(block, address);
  if (!barrier.pending) fail("barrier %u has more arrivals than it waits for", address);
  if (barrier.phase && !barrier.observed) fail("nobody waited for the phase of %u before this arrival", address);
  barrier.pending--;
  settle(barrier);
}
inline void barrier_init(u32 address, u32 arrivals) {
  Mbarrier &made = barriers[own_block()][offset_of(address, 8, 8) / 8];
  if (made.made) fail("barrier %u is made twice", address);
  made = {true, false, false, running, (int)arrivals, (int)arrivals, 0, 0};
}
inline void barrier_init_fence() {
  for (auto &barrier : barriers[own_block()])
    if (barrier.maker == running) barrier.fenced = true;
}
inline void barrier_expect(u32 address, u32 bytes) {
  barrier_of(own_block(), address).bytes += bytes;
  arrive(own_block(), address);
}
inline void barrier_arrive(u32 address) { arrive(own_block(), address); }
inline void barrier_arrive_at(u32 address, u32 rank) {
  if ((int)rank >= cluster_blocks) fail("no block %u in the cluster", rank);
  arrive(rank, address);
  let_others();
}
inline void barrier_wait(u32 address, u32 parity) {
  Mbarrier &barrier = barrier_of(own_block(), address);
  let_others();
  wait_until([&barrier, parity] { return (barrier.phase & 1) != (long)parity; });
  barrier.observed = true;
}

// Copies. A map's bytes here: what `cuTensorMapEncodeTiled` is given (hopper_gemm_on_cpu.py).
struct Map { u64 address; u32 element, columns, rows, stride, box_columns, box_rows, swizzle; };
struct Copy { bool store; Map map; int block, thread, pace; u32 mask, shared, barrier; int column, row; };
static std::vector<Copy> copies;
static int committed[MAX_THREADS], uncommitted[MAX_THREADS];

inline u32 bytes_of(const Map &map) { return map.box_columns * map.element * map.box_rows; }
inline void issue(Copy copy, const TensorMap *map) {
  memcpy(&copy.map, map, sizeof copy.map);
  const u32 width = copy.map.box_columns * copy.map.element;
  if ((uintptr_t)map % 64) fail("tensor map at no multiple of 64");
  if (width % 16 || (copy.map.swizzle && width > 128) || copy.map.box_columns > 256 || copy.map.box_rows > 256 ||
      copy.map.stride % 16 || copy.map.address % 16)
    fail("not a tensor map: %u x %u elements of %u bytes", copy.map.box_rows, copy.map.box_columns, copy.map.element);
  if (copy.map.swizzle && width != 128) fail("only whole swizzled rows are emulated");
  offset_of(copy.shared, bytes_of(copy.map), 128);
  copy.block = own_block(), copy.thread = running, copy.pace = one_in(4) ? copy.store ? 300 : 30 : 3;
  copies.push_back(copy);
  let_others();
}
inline void load_box_to(const TensorMap *map, u32 barrier, u32 to, int column, int row, u16 mask) {
  if (!mask || mask >> cluster_blocks) fail("no blocks %u in the cluster", mask);
  issue({false, {}, 0, 0, 0, mask, to, barrier, column, row}, map);
}
inline void load_box(const TensorMap *map, u32 barrier, u32 to, int column, int row) {
  load_box_to(map, barrier, to, column, row, (u16)(1 << own_block()));
}
inline void store_box(const TensorMap *map, u32 from, int column, int row) {
  uncommitted[running]++;
  issue({true, {}, 0, 0, 0, 0, from, 0, column, row}, map);
}
inline void commit_stores() { committed[running] += uncommitted[running], uncommitted[running] = 0; }
inline void wait_stores() {
  const int self = running;  // a thread's open copies are never among those that it waits for
  wait_until([self] { return committed[self] == 0; });
}
inline void wait_stores_read() { wait_stores(); }  // a copy reads and writes at once here
inline void copy_fence() {
  for (short &writer : writers[own_block()])
    if (writer == running + 1) writer = 0;
}

bool multiplied(int block, u32 first, u32 bytes);  // whether products in flight read it: wgmma_on_cpu.hpp

inline void copy_to(int block, const Copy &copy) {
  const Map &map = copy.map;
  const u32 width = map.box_columns * map.element, at = copy.shared - WINDOW;
  if (!alive(block)) fail("a copy went to a block that has ended");
  if (multiplied(block, at, bytes_of(map))) fail("a copy went over what a product reads");
  for (const Copy &other : copies)
    if (other.store && other.block == block && other.shared < copy.shared + bytes_of(map) &&
        copy.shared < other.shared + bytes_of(other.map))
      fail("a copy went over what another has still to read");
  for (u32 line = at / LINE; line <= (at + bytes_of(map) - 1) / LINE; line++) {
    if (lines[block][line].unread) fail("a copy went over what nobody has read, at %u", line * LINE);
    lines[block][line].unread = true;
  }
  for (u32 r = 0; r < map.box_rows; r++)
    for (u32 c = 0; c < width; c++) {
      const long row = (long)copy.row + r, byte = (long)copy.column * map.element + c;
      const bool inside = row >= 0 && row < map.rows && byte >= 0 && byte < (long)map.columns * map.element;
      const u32 to = copy.shared + r * width + c;
      shared_bytes[block][(map.swizzle ? swizzled(to) : to) - WINDOW] =
          inside ? ((const u8 *)map.address)[row * map.stride + byte] : 0;
    }
  Mbarrier &barrier = barrier_of(block, copy.barrier);
  barrier.bytes -= bytes_of(map);
  settle(barrier);
}
inline void copy_from(const Copy &copy) {
  const Map &map = copy.map;
  const u32 width = map.box_columns * map.element, at = copy.shared - WINDOW;
  if (!alive(copy.block)) fail("a copy reads a block that has ended");
  for (u32 part = at / 16; part < (at + bytes_of(map)) / 16; part++)
    if (writers[copy.block][part]) fail("a copy reads what had no fence, at %u", part * 16);
  for (u32 r = 0; r < map.box_rows; r++)
    for (u32 c = 0; c < width; c++) {
      const long row = (long)copy.row + r, byte = (long)copy.column * map.element + c;
      const u32 place = copy.shared + r * width + c, from = (map.swizzle ? swizzled(place) : place) - WINDOW;
      if (row >= 0 && row < map.rows && byte >= 0 && byte < (long)map.columns * map.element)
        ((u8 *)map.address)[row * map.stride + byte] = shared_bytes[copy.block][from];
    }
  if (committed[copy.thread]) committed[copy.thread]--;
  else uncommitted[copy.thread]--;
  progress++;
}
inline void do_copies() {
  running = -1;
  for (size_t i = 0; i < copies.size() && !failure[0];) {
    if (!one_in(copies[i].pace)) { i++; continue; }
    const Copy copy = copies[i];
    copies.erase(copies.begin() + i);
    if (copy.store) copy_from(copy);
    else
      for (int block = 0; block < cluster_blocks; block++)
        if (copy.mask >> block & 1) copy_to(block, copy);
  }
}

// Bytes that threads write themselves.
inline void write_shared(u32 address, const void *from, u32 bytes) {
  const u32 at = offset_of(address, bytes, bytes);
  for (const Copy &copy : copies)
    if (copy.store && copy.block == own_block() && copy.shared < address + bytes &&
        address < copy.shared + bytes_of(copy.map))
      fail("wrote to %u, which a copy has still to read", at);
  memcpy(&shared_bytes[own_block()][at], from, bytes);
  short &writer = writers[own_block()][at / 16];
  if (writer && writer != running + 1) fail("two threads wrote to %u", at);
  writer = running + 1;
}
static u32 matrix_rows[MAX_THREADS], matrix_parts[MAX_THREADS][4];
inline void store_matrices(u32 row, u32 a, u32 b, u32 c, u32 d) {  // the thread that named a row writes all of it
  const u32 parts[4] = {a, b, c, d};
  memcpy(matrix_parts[running], parts, 16);
  __syncwarp();
  const int lane = running % 32, warp = running - lane;
  u32 whole[4];
  for (int i = 0; i < 4; i++) whole[i] = matrix_parts[warp + lane % 8 * 4 + i][lane / 8];
  write_shared(row, whole, 16);
  __syncwarp();
}
