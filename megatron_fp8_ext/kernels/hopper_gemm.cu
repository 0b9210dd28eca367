// D = X W^T (+ a bias) (+ a matrix): X [M, K] E4M3 with scales of 1x128, W [N, K] E4M3 with scales of 128x128, D [M, N]
// BF16; the sum is rounded once. For Hopper, compiled at run time.
//
// One block a multiprocessor, which takes tile after tile. Of its three warpgroups the last one loads: one thread
// issues the copies of a block of K (a stage) as soon as the one before it in that place is used up. The other two
// multiply: each has half of the tile's rows, 64 at a time. The tensor cores sum 128 of K, then FP32 registers take
// the sum times the two scales. While one warpgroup does that the other has the tensor cores. They wait for each other
// nowhere, so one can write its result while the other multiplies. A cluster is two blocks with tiles beside each
// other; the rows of X, which both need, are loaded in halves, each for both.
//
// After hopper.cuh and hopper_async.cuh. Macros from hopper_gemm.py: BIAS or ADD (what is added), CLUSTER (1 or 2
// blocks), STAGES, LOADER_REGISTERS, MULTIPLIER_REGISTERS.

static_assert((CLUSTER == 1 || CLUSTER == 2) && !(BIAS && ADD), "what the code below is written for");

constexpr int TILE_M = 256, TILE_N = 128, BLOCK_K = 128;
constexpr int MULTIPLIERS = 2, ROWS = TILE_M / MULTIPLIERS, WAVES = ROWS / 64;
constexpr int GROUP = 8;  // tiles below each other that share columns of W in the L2 cache

constexpr u32 X_BYTES = TILE_M * BLOCK_K, W_BYTES = TILE_N * BLOCK_K, SCALE_BYTES = TILE_M * 4;
constexpr u32 D_PART_BYTES = ROWS * 128;  // 64 columns of one warpgroup's rows
// Shared memory, from its start; a multiple of 1024 bytes for each part that is swizzled.
constexpr u32 D_AT = 0, X_AT = D_AT + MULTIPLIERS * 2 * D_PART_BYTES, W_AT = X_AT + STAGES * X_BYTES;
constexpr u32 SCALES_AT = W_AT + STAGES * W_BYTES, FULL_AT = SCALES_AT + STAGES * SCALE_BYTES;
constexpr u32 EMPTY_AT = FULL_AT + STAGES * 8, ADDEND_AT = EMPTY_AT + STAGES * 8;
constexpr u32 SHARED_BYTES = ADDEND_AT + MULTIPLIERS * 8;
static_assert(SHARED_BYTES <= 232448, "what a block can have");

struct Arguments {
  TensorMap x, x_scales, w, d;  // [M, K], [K / 128, M], [N, K], [M, N]
  TensorMap addend;             // [M, N], if ADD
  const float *w_scales;        // [N / 128, w_stride]
  const u32 *bias;              // [N] BF16, if BIAS
  int w_stride, w_rows;         // w_rows = N / 128
  int blocks;                   // K / 128
  int tiles_m, tiles_n;         // the columns' in clusters
};

// A block's tile, of those that the cluster takes: clusters go down a group's rows, then on to the next columns.
struct Tile {
  int number, m = 0, n = 0;
  bool exists;
  __device__ __forceinline__ Tile(const Arguments &a, int number, u32 rank)
      : number(number), exists(number < a.tiles_m * a.tiles_n) {
    if (!exists) return;
    const u32 of_group = GROUP * a.tiles_n, group = number / of_group, within = number % of_group;
    const u32 height = min(GROUP, a.tiles_m - (int)group * GROUP);
    m = group * GROUP + within % height;
    n = within / height * CLUSTER + (CLUSTER > 1 ? rank : 0);
  }
  __device__ __forceinline__ Tile next(const Arguments &a, u32 rank) const {
    return Tile(a, number + gridDim.x / CLUSTER, rank);
  }
  // Its row of W's scales; a cluster's second block may have no columns, and reads what is there.
  __device__ __forceinline__ const float *w_scales(const Arguments &a) const {
    return a.w_scales + (size_t)min(n, a.w_rows - 1) * a.w_stride;
  }
};

struct Stage {
  u32 index = 0, parity = 0;
  __device__ __forceinline__ void advance() {
    if (++index == STAGES) index = 0, parity ^= 1;
  }
};

__device__ __forceinline__ void load_tiles(const Arguments &a, u32 shared, u32 rank) {
  Stage stage;
  for (Tile tile(a, blockIdx.x / CLUSTER, rank); tile.exists; tile = tile.next(a, rank))
    for (int k = 0; k < a.blocks; k++, stage.advance()) {
      const u32 full = shared + FULL_AT + stage.index * 8;
      const int column = k * BLOCK_K, m = tile.m * TILE_M, n = tile.n * TILE_N;
      barrier_wait(shared + EMPTY_AT + stage.index * 8, stage.parity ^ 1);
      barrier_expect(full, X_BYTES + W_BYTES + SCALE_BYTES);
      const u32 x_to = shared + X_AT + stage.index * X_BYTES;
      if (CLUSTER == 1) load_box(&a.x, full, x_to, column, m);
      else load_box_to(&a.x, full, x_to + rank * (TILE_M / 2 * BLOCK_K), column, m + rank * (TILE_M / 2), 3);
      load_box(&a.w, full, shared + W_AT + stage.index * W_BYTES, column, n);
      load_box(&a.x_scales, full, shared + SCALES_AT + stage.index * SCALE_BYTES, m, k);
    }
}

// The descriptor of a matrix in shared memory whose rows are 128 bytes along K, swizzled, at a multiple of 1024: bits
// 0-13 address / 16, 16-29 not used by this layout (1), 32-45 bytes from 8 rows to the next 8 / 16, 62-63 the swizzle.
__device__ __forceinline__ u64 matrix_at(u32 at) {
  return (u64)((at & 0x3FFFF) >> 4) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

// Whether these are in registers, which is always so: who asks waits for it. An arrival does not wait by itself for
// loads from shared memory that were issued before, and a copy may overtake them (seen on an H200). No product has all
// bits set, not even NaN.
template <int COUNT>
__device__ __forceinline__ bool are_loaded(const float (&one)[COUNT], const float (&other)[COUNT]) {
  u32 bits = ~0u;
#pragma unroll
  for (int i = 0; i < COUNT; i++) bits &= __float_as_uint(one[i]) & __float_as_uint(other[i]);
  return bits != ~0u;
}

// A warp has read the stage: both blocks' loaders write it.
__device__ __forceinline__ void release(u32 shared, const Stage &stage, u32 lane, bool loaded) {
  const u32 empty = shared + EMPTY_AT + stage.index * 8;
  __syncwarp();
  if (CLUSTER == 1) {
    if (lane == 0 && loaded) barrier_arrive(empty);
  } else if (lane < CLUSTER && loaded) {
    barrier_arrive_at(empty, lane);
  }
}

// 64 rows of a warpgroup's part of D, with the bias or the addend, which lies where D will: BF16 to shared memory, as
// copies of 64 columns with a 128-byte swizzle read it.
__device__ __forceinline__ void store_wave(const float (&sum)[64], const u32 *bias, u32 rows, u32 warp, u32 lane) {
  const u32 row = warp * 16 + lane % 16, upper = warp * 16 + lane / 4;
#pragma unroll
  for (int j = 0; j < 16; j += 2) {  // columns 8 j to 8 j + 15
    const u32 part = rows + j / 8 * D_PART_BYTES;
    u32 pairs[4];  // columns 8 j and on of the upper row and of the lower one, columns 8 j + 8 and on of both
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float first = sum[4 * j + 2 * i], second = sum[4 * j + 2 * i + 1];
      if (BIAS || ADD) {
        const u32 chunk = (j + i / 2) % 8 ^ upper % 8;
        const u32 more = BIAS ? __ldg(bias + (j + i / 2) * 4)
                              : load_shared_pair(part + (upper + i % 2 * 8) * 128 + chunk * 16 + lane % 4 * 4);
        first = __fadd_rn(first, low(more)), second = __fadd_rn(second, high(more));
      }
      pairs[i] = round_pair(first, second);
    }
    if (ADD) __syncwarp();  // it has read what it writes over
    store_matrices(part + row * 128 + ((j % 8 + lane / 16) ^ row % 8) * 16, pairs[0], pairs[1], pairs[2], pairs[3]);
  }
}

__device__ __forceinline__ void multiply_tiles(const Arguments &a, u32 shared, u32 rank, u32 group) {
  const u32 thread = threadIdx.x % 128, warp = __shfl_sync(~0u, thread / 32, 0), lane = thread % 32;
  const u32 d_at = shared + D_AT + group * 2 * D_PART_BYTES, addend = shared + ADDEND_AT + group * 8;
  const u64 x_at = matrix_at(shared + X_AT + group * ROWS * BLOCK_K), w_at = matrix_at(shared + W_AT);
  const u32 scales_at = shared + SCALES_AT + (group * ROWS + warp * 16 + lane / 4) * 4;
  Stage stage;
  Tile tile(a, blockIdx.x / CLUSTER, rank);
  float w_scale = __ldg(tile.w_scales(a));
  for (u32 parity = 0; tile.exists; parity ^= 1) {
    const int row = tile.m * TILE_M + group * ROWS, column = tile.n * TILE_N;
    Tile next = tile;
    const float *of_tile = tile.w_scales(a);
    float sum[WAVES][64] = {};
#pragma unroll 1
    for (int k = 0; k < a.blocks; k++, stage.advance()) {
      float upper[WAVES], lower[WAVES], later;  // scales: of rows, 8 apart, times W's
      barrier_wait(shared + FULL_AT + stage.index * 8, stage.parity);
#pragma unroll
      for (int wave = 0; wave < WAVES; wave++) {
        const u32 scales = scales_at + stage.index * SCALE_BYTES + wave * 64 * 4;
        upper[wave] = __fmul_rn(load_shared(scales), w_scale);
        lower[wave] = __fmul_rn(load_shared(scales + 32), w_scale);
      }
#pragma unroll
      for (int wave = 0; wave < WAVES; wave++) {
        const u64 x = x_at + (stage.index * X_BYTES + wave * 64 * BLOCK_K) / 16;
        const u64 w = w_at + stage.index * W_BYTES / 16;
        float part[64];
        pin(part);
        mma_begin();
#pragma unroll
        for (int i = 0; i < BLOCK_K / 32; i++) mma_64x128x32(part, x + i * 2, w + i * 2, i > 0);
        mma_commit();
        pin(part);
        if (wave == 0) {  // what comes next, while the tensor cores work
          if (k == 0) next = tile.next(a, rank);
          later = __ldg(k + 1 < a.blocks ? of_tile + k + 1 : next.w_scales(a));
          if (ADD && k == 0) {
            if (thread == 0) {
              wait_stores_read();
              barrier_expect(addend, 2 * D_PART_BYTES);
              load_box(&a.addend, addend, d_at, column, row);
              load_box(&a.addend, addend, d_at + D_PART_BYTES, column + 64, row);
            }
            __syncwarp();
          }
        }
        mma_wait();
        pin(part);
        if (wave == WAVES - 1) release(shared, stage, lane, are_loaded(upper, lower));
#pragma unroll
        for (int i = 0; i < 64; i += 4) {
          sum[wave][i] = __fmaf_rn(part[i], upper[wave], sum[wave][i]);
          sum[wave][i + 1] = __fmaf_rn(part[i + 1], upper[wave], sum[wave][i + 1]);
          sum[wave][i + 2] = __fmaf_rn(part[i + 2], lower[wave], sum[wave][i + 2]);
          sum[wave][i + 3] = __fmaf_rn(part[i + 3], lower[wave], sum[wave][i + 3]);
        }
      }
      w_scale = later;
    }
    if (ADD) barrier_wait(addend, parity);
    else if (thread == 0) wait_stores_read();
    sync_threads(1 + group, 128);
    const u32 *bias = BIAS ? a.bias + min(tile.n, a.w_rows - 1) * (TILE_N / 2) + lane % 4 : nullptr;
#pragma unroll
    for (int wave = 0; wave < WAVES; wave++) store_wave(sum[wave], bias, d_at + wave * 64 * 128, warp, lane);
    copy_fence();
    sync_threads(1 + group, 128);
    if (thread == 0) {
      store_box(&a.d, d_at, column, row);
      store_box(&a.d, d_at + D_PART_BYTES, column + 64, row);
      commit_stores();
    }
    tile = next;
  }
  if (thread == 0) wait_stores();
}

constexpr int THREADS = 128 * (MULTIPLIERS + 1);

__device__ __forceinline__ void sync_all() {
  if (CLUSTER > 1) cluster_sync();
  else sync_threads(0, THREADS);
}

#if CLUSTER > 1
#define IN_CLUSTERS __cluster_dims__(CLUSTER, 1, 1)
#else
#define IN_CLUSTERS
#endif

extern "C" __global__ void IN_CLUSTERS __launch_bounds__(THREADS, 1)
    block_scaled_gemm(const __grid_constant__ Arguments a) {
  const u32 shared = shared_memory(), rank = CLUSTER > 1 ? cluster_rank() : 0;
  const u32 group = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (threadIdx.x == 0) {
    if (shared % 1024) give_up();
    for (int stage = 0; stage < STAGES; stage++) {
      barrier_init(shared + FULL_AT + stage * 8, 1);
      barrier_init(shared + EMPTY_AT + stage * 8, CLUSTER * MULTIPLIERS * 4);
    }
    for (int other = 0; other < MULTIPLIERS; other++) barrier_init(shared + ADDEND_AT + other * 8, 1);
    barrier_init_fence();
  }
  __syncwarp();
  sync_all();
  if (group == MULTIPLIERS) {
    give_registers<LOADER_REGISTERS>();
    if (threadIdx.x == MULTIPLIERS * 128) load_tiles(a, shared, rank);
    __syncwarp();
  } else {
    take_registers<MULTIPLIER_REGISTERS>();
    multiply_tiles(a, shared, rank, group);
    __syncwarp();
  }
  sync_all();  // nothing is copied or arrives into a block that has ended
}
