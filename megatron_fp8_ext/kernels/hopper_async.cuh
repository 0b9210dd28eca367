// Hopper's asynchronous copies, barriers and matrix products, an instruction a function: PTX and nothing else, so that
// a build for the CPU can put other functions in their place (tests/hopper_on_cpu.hpp, wgmma_on_cpu.hpp). After
// hopper.cuh.
//
// Addresses of shared memory are those of its 32-bit window. Names of PTX ISA 9.0 stand beside each function.

typedef unsigned long long u64;

struct alignas(64) TensorMap {  // CUtensorMap, made by cuTensorMapEncodeTiled
  u8 opaque[128];
};

// A wait that takes longer, in nanoseconds, is an error: the launch fails and does not hang.
constexpr u64 PATIENCE = 10000000000;

__device__ __forceinline__ u32 shared_memory() {
  extern __shared__ __align__(1024) u8 dynamic[];
  return (u32)__cvta_generic_to_shared(dynamic);
}

__device__ __forceinline__ float load_shared(u32 at) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(at) : "memory");
  return value;
}

__device__ __forceinline__ u32 load_shared_pair(u32 at) {  // two of BF16
  u32 pair;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(pair) : "r"(at) : "memory");
  return pair;
}

// An illegal store, which ends the launch. Not `trap`: with it in a wait ptxas (CUDA 13.0) spills accumulators.
__device__ __forceinline__ void give_up() {
  asm volatile("st.global.u32 [%0], %1;" ::"l"((u64)0), "r"(0) : "memory");
}

__device__ __forceinline__ u64 nanoseconds() {  // %globaltimer
  u64 now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

// Clusters.

__device__ __forceinline__ u32 cluster_rank() {  // %cluster_ctarank
  u32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ void cluster_sync() {  // barrier.cluster: what came before is seen by all of the cluster
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ void sync_threads(u32 barrier, u32 threads) {  // bar.sync: 1 to 15; 0 is __syncthreads
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// mbarrier objects, 8 bytes.

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {  // mbarrier.init
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// To follow `barrier_init` in the same thread, before a cluster_sync: for the cluster's threads and for copies.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async;" ::: "memory");
}

// One arrival, and `bytes` of copies to wait for in this phase.
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {  // mbarrier.arrive.expect_tx
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {  // mbarrier.arrive
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// At the barrier that lies at the same place in the block `rank` of the cluster.
__device__ __forceinline__ void barrier_arrive_at(u32 barrier, u32 rank) {  // mapa, mbarrier.arrive
  asm volatile(
      "{\n\t.reg .b32 there;\n\tmapa.shared::cluster.u32 there, %0, %1;\n\t"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n\t}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

__device__ __forceinline__ bool barrier_passed(u32 barrier, u32 parity) {  // mbarrier.try_wait.parity
  u32 passed;
  asm volatile(
      "{\n\t.reg .pred passed;\n\tmbarrier.try_wait.parity.shared::cta.b64 passed, [%1], %2;\n\t"
      "selp.u32 %0, 1, 0, passed;\n\t}"
      : "=r"(passed)
      : "r"(barrier), "r"(parity)
      : "memory");
  return passed;
}

// Until the phase of this parity is over; the phase before the first one, of parity 1, is.
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
  if (barrier_passed(barrier, parity)) return;
  const u64 since = nanoseconds();
  while (!barrier_passed(barrier, parity))
    if (nanoseconds() - since > PATIENCE) give_up();
}

// Copies of boxes of a matrix (TMA). `column` and `row` are of its first element; what lies outside of the matrix is
// read as zeros, which count as bytes too, and is not written.

__device__ __forceinline__ void load_box(const TensorMap *map, u32 barrier, u32 to, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// To the same place in the blocks of `mask`, whose barriers at the same place count the bytes.
__device__ __forceinline__ void load_box_to(const TensorMap *map, u32 barrier, u32 to, int column, int row, u16 mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(mask)
      : "memory");
}

__device__ __forceinline__ void store_box(const TensorMap *map, u32 from, int column, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(column),
               "r"(row), "r"(from)
               : "memory");
}

__device__ __forceinline__ void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until this thread's committed stores have read shared memory.
__device__ __forceinline__ void wait_stores_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// Until they are done.
__device__ __forceinline__ void wait_stores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// What this thread wrote to shared memory is seen by copies that are issued later.
__device__ __forceinline__ void copy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Four 8x8 matrices of 16 bits: lane i names row i % 8 of matrix i / 8, 16 bytes, and holds in register m the columns
// 2 (i % 4) and the next of row i / 4 of matrix m.
__device__ __forceinline__ void store_matrices(u32 row, u32 a, u32 b, u32 c, u32 d) {  // stmatrix
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}

// A warpgroup's registers, of a pool that its block was launched with.

template <int COUNT>
__device__ __forceinline__ void take_registers() {  // setmaxnreg.inc
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ __forceinline__ void give_registers() {  // setmaxnreg.dec
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Products of a warpgroup (wgmma). A thread of warp w, lane i, holds in d[4 j] and d[4 j + 1] the columns
// 8 j + 2 (i % 4) and the next of row 16 w + i / 4, and in d[4 j + 2] and d[4 j + 3] those of the row 8 below.

// The compiler must not move what it does with the accumulators into the time when the tensor cores own them.
__device__ __forceinline__ void pin(float (&d)[64]) {
#pragma unroll
  for (int i = 0; i < 64; i++) asm volatile("" : "+f"(d[i])::"memory");
}

__device__ __forceinline__ void mma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void mma_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

#define FOUR(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SIXTEEN(i) FOUR(i), FOUR(i + 4), FOUR(i + 8), FOUR(i + 12)

// d = a b^T, or is added to if `add`: a is 64 x 32 and b 128 x 32, E4M3, descriptors of both (`matrix_at`).
__device__ __forceinline__ void mma_64x128x32(float (&d)[64], u64 a, u64 b, bool add) {
  asm volatile(
      "{\n\t.reg .pred add;\n\tsetp.ne.b32 add, %66, 0;\n\t"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, add, 1, 1;\n\t}"
      : SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48)
      : "l"(a), "l"(b), "r"((u32)add));
}
