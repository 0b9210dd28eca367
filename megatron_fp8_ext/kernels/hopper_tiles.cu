// Tiles of 128x128 BF16, made or read, and cast to 1x128 E4M3 along rows, along columns or both: the CUDA form of
// the Triton kernels in cast.py, swiglu.py and rmsnorm.py, for matrices of whole tiles. Compiled at run time.
//
// 256 threads. A thread holds 8 neighbouring rows of 8 neighbouring columns as BF16 pairs, so the codes of both
// directions are made of registers: 8 bytes of a row are 8 columns, 8 bytes of a column are 8 rows. Column-wise
// codes go through shared memory once, whose 8-byte slots are permuted so that no two threads of a half warp meet.
//
// After hopper.cuh. Macros from hopper.py: SOURCE (what makes the tile), ROWS, COLUMNS, POWER_OF_TWO, KEEP (store the tile too),
// STASH (SwiGLU's input in 8 bits, stash.py: its forward writes that, its backward reads it), TOTAL (the sums of a plain
// tile's columns too, FP32).

#define PLAIN 0
#define SWIGLU 1
#define SWIGLU_BACKWARD 2    // tiles of the gradients of gate and of up
#define SWIGLU_BACKWARD_Y 3  // and of SwiGLU's result, column-wise
#define RMSNORM 4

struct Arguments {
  const u16 *x, *dy, *gain;
  const float *rstd;
  u8 *row_codes;
  float *row_scales;
  u8 *column_codes;
  float *column_scales;
  u8 *y_codes;
  float *y_scales;
  u16 *kept;
  u8 *stash_codes;
  u16 *stash_scales;
  float *totals;
  int rows, columns;  // of the tiles' matrix; with SwiGLU's backward `columns` is F, that of one half
  int row_stride, column_stride, y_stride;
};

struct Tile {
  u32 pair[8][4];  // [row][two columns, the first in the low half]
};

struct Place {
  int tile_m, tile_k, warp, lane, first_row, first_column;
  __device__ Place(int m, int k) : tile_m(m), tile_k(k), warp(threadIdx.x >> 5), lane(threadIdx.x & 31) {
    first_row = warp * 16 + (lane >> 4) * 8;
    first_column = (lane & 15) * 8;
  }
};

__device__ __forceinline__ void keep(const Tile &tile, const Place &at, u16 *kept, int columns) {
#if KEEP
#pragma unroll
  for (int i = 0; i < 8; i++) {
    size_t row = (size_t)at.tile_m * 128 + at.first_row + i;
    *(uint4 *)(kept + row * columns + at.tile_k * 128 + at.first_column) =
        make_uint4(tile.pair[i][0], tile.pair[i][1], tile.pair[i][2], tile.pair[i][3]);
  }
#endif
}

__device__ __forceinline__ void store_rows(const Tile &tile, const Place &at, u8 *codes, float *scales, int columns,
                                           int stride) {
  u32 amax[4];  // rows 2j and 2j + 1
#pragma unroll
  for (int j = 0; j < 4; j++) {
    u32 both[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const u32 *row = tile.pair[2 * j + h];
      both[h] = larger(larger(magnitude(row[0]), magnitude(row[1])), larger(magnitude(row[2]), magnitude(row[3])));
    }
    amax[j] = larger(__byte_perm(both[0], both[1], 0x5410), __byte_perm(both[0], both[1], 0x7632));
#pragma unroll
    for (int other = 8; other > 0; other >>= 1) amax[j] = larger(amax[j], __shfl_xor_sync(~0u, amax[j], other));
  }
  float own = 1.0f;
  u8 *out = codes + ((size_t)at.tile_m * 128 + at.first_row) * columns + at.tile_k * 128 + at.first_column;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    float s, inverse;
    scale_of(i & 1 ? amax[i / 2] & 0xFFFF0000u : amax[i / 2] << 16, s, inverse);
    if ((at.lane & 15) == i) own = inverse;
    const u32 *p = tile.pair[i];
    uint2 word;
    word.x = encode(low(p[0]) * s, high(p[0]) * s, low(p[1]) * s, high(p[1]) * s);
    word.y = encode(low(p[2]) * s, high(p[2]) * s, low(p[3]) * s, high(p[3]) * s);
    *(uint2 *)(out + (size_t)i * columns) = word;
  }
  if ((at.lane & 15) < 8)
    scales[(size_t)at.tile_k * stride + at.tile_m * 128 + at.first_row + (at.lane & 15)] = own;
}

__device__ __forceinline__ void store_columns(const Tile &tile, const Place &at, u8 *codes, float *scales, int rows,
                                              int stride) {
  __shared__ float column_scale[128];
  __shared__ uint4 transposed[128][8];              // [column][16 rows]
  uint4(*amaxes)[16] = (uint4(*)[16])transposed;    // [warp][8 columns], before that
#if SOURCE == SWIGLU_BACKWARD || SOURCE == SWIGLU_BACKWARD_Y
  __syncthreads();  // the result before this one is out of it
#endif
  u32 amax[4];
#pragma unroll
  for (int p = 0; p < 4; p++) {
    amax[p] = magnitude(tile.pair[0][p]);
#pragma unroll
    for (int i = 1; i < 8; i++) amax[p] = larger(amax[p], magnitude(tile.pair[i][p]));
    amax[p] = larger(amax[p], __shfl_xor_sync(~0u, amax[p], 16));
  }
  if (at.lane < 16) amaxes[at.warp][at.lane] = make_uint4(amax[0], amax[1], amax[2], amax[3]);
  __syncthreads();
  if (threadIdx.x < 128) {
    const u16 *of = (const u16 *)amaxes + threadIdx.x;
    u32 largest = 0;  // BF16 magnitudes are ordered as integers; a NaN, which lies above infinity, counts as zero
#pragma unroll
    for (int w = 0; w < 8; w++) {
      u32 bits = of[w * 128];
      largest = max(largest, bits > 0x7F80u ? 0u : bits);
    }
    float s, inverse;
    scale_of(largest << 16, s, inverse);
    column_scale[threadIdx.x] = s;
    scales[(size_t)at.tile_m * stride + at.tile_k * 128 + threadIdx.x] = inverse;
  }
  __syncthreads();
  const int group = at.first_row >> 3, mix = at.lane & 15;
#pragma unroll
  for (int j = 0; j < 8; j++) {
    const float s = column_scale[at.first_column + j];
    float value[8];
#pragma unroll
    for (int i = 0; i < 8; i++) value[i] = s * (j & 1 ? high(tile.pair[i][j / 2]) : low(tile.pair[i][j / 2]));
    uint2 word;
    word.x = encode(value[0], value[1], value[2], value[3]);
    word.y = encode(value[4], value[5], value[6], value[7]);
    ((uint2 *)transposed[at.first_column + j])[group ^ mix] = word;
  }
  __syncthreads();
#pragma unroll
  for (int round = 0; round < 4; round++) {
    const int column = round * 32 + (threadIdx.x >> 3), part = threadIdx.x & 7, f = (column >> 3) & 15;
    uint4 word = transposed[column][part ^ (f >> 1)];
    if (f & 1) word = make_uint4(word.z, word.w, word.x, word.y);
    *(uint4 *)(codes + ((size_t)at.tile_k * 128 + column) * rows + at.tile_m * 128 + part * 16) = word;
  }
}

#if TOTAL
__device__ __forceinline__ void sum_columns(const Tile &tile, const Place &at, float *totals, int columns) {
  __shared__ float4 partial[8][32];  // [warp][column]
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int j = 0; j < 4; j++) {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const u32 pair = tile.pair[i][half * 2 + j / 2];
        sum[j] += j & 1 ? high(pair) : low(pair);
      }
      sum[j] += __shfl_xor_sync(~0u, sum[j], 16);
    }
    if (at.lane < 16) partial[at.warp][at.lane * 2 + half] = make_float4(sum[0], sum[1], sum[2], sum[3]);
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < 8; w++) total += ((const float *)partial[w])[threadIdx.x];
    totals[(size_t)at.tile_m * columns + at.tile_k * 128 + threadIdx.x] = total;
  }
}
#endif

__device__ __forceinline__ uint4 eight(const u16 *matrix, const Place &at, int i, int columns) {
  size_t row = (size_t)at.tile_m * 128 + at.first_row + i;
  return __ldg((const uint4 *)(matrix + row * columns + at.tile_k * 128 + at.first_column));
}

__device__ __forceinline__ float product(float gate, float up) { return gate * sigmoid_of(gate) * up; }

#if STASH
__device__ __forceinline__ size_t stash_block(const Place &at, int i, int half, const Arguments &a) {
  const int tile = at.tile_k + half * (a.columns / 128);
  return ((size_t)tile * a.rows + at.tile_m * 128 + at.first_row + i) * 4 + ((at.lane & 15) >> 2);
}

__device__ __forceinline__ size_t stash_eight(const Place &at, int i, int half, const Arguments &a) {
  const size_t row = (size_t)at.tile_m * 128 + at.first_row + i;
  return row * 2 * a.columns + half * a.columns + at.tile_k * 128 + at.first_column;
}

// The larger of each half; a NaN wins.
__device__ __forceinline__ u32 larger_or_nan(u32 a, u32 b) {
  u32 out;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  return out;
}

// Two numbers below 2^22 in size, rounded to integers, in the low two bytes: 1.5 2^23 leaves no bits after the point.
__device__ __forceinline__ u32 integers(u32 pair, float inverse) {
  const float first = fmaf(low(pair), inverse, 12582912.0f), second = fmaf(high(pair), inverse, 12582912.0f);
  return __byte_perm(__float_as_uint(first), __float_as_uint(second), 0x0040);
}

// 1 / x, correctly rounded for every BF16 number from 2^-100 on: a Newton step from a result that is off by some ulp.
__device__ __forceinline__ float reciprocal_rn(float x) {
  const float near = reciprocal(x);
  return fmaf(near, fmaf(-x, near, 1.0f), near);
}

// Eight columns of a row; four neighbouring lanes have a block of 32.
__device__ __forceinline__ void keep_in_8_bits(const uint4 &x, u8 *to, u16 *scale_to, bool first) {
  u32 both = larger_or_nan(larger_or_nan(magnitude(x.x), magnitude(x.y)),
                           larger_or_nan(magnitude(x.z), magnitude(x.w)));
#pragma unroll
  for (int other = 1; other <= 2; other <<= 1) both = larger_or_nan(both, __shfl_xor_sync(~0u, both, other));
  both = larger_or_nan(both, __byte_perm(both, both, 0x1032));
  u32 bits = round_pair(low(both) * (1.0f / 127), 0.0f) & 0xFFFFu;
  const bool broken = (both & 0x7FFFu) >= 0x7F80u;  // infinite or NaN
  const bool zero = bits < 0x0D80u;                 // 2^-100
  const float inverse = zero || broken ? 0.0f : reciprocal_rn(__uint_as_float(bits << 16));
  uint2 codes;
  codes.x = __byte_perm(integers(x.x, inverse), integers(x.y, inverse), 0x5410);
  codes.y = __byte_perm(integers(x.z, inverse), integers(x.w, inverse), 0x5410);
  if (broken) codes.x = codes.y = 0;  // infinity times zero is none
  *(uint2 *)to = codes;
  if (first) *scale_to = broken ? 0x7FC0u : zero ? 0 : (u16)bits;
}

// Eight columns out of their codes and the scale of their block: 2^23 + 128 + code as FP32, without a conversion.
__device__ __forceinline__ void out_of_8_bits(float value[8], const uint2 &codes, float scale) {
#pragma unroll
  for (int j = 0; j < 8; j++) {
    const u32 biased = (j < 4 ? codes.x : codes.y) ^ 0x80808080u;
    value[j] = (__uint_as_float(__byte_perm(biased, 0x4B000000u, 0x7540 | (j & 3))) - 8388736.0f) * scale;
  }
}
#endif

#define OF(vector, p) (p == 0 ? vector.x : p == 1 ? vector.y : p == 2 ? vector.z : vector.w)

__device__ __forceinline__ void unpack(float value[8], const uint4 &x) {
#pragma unroll
  for (int p = 0; p < 4; p++) value[2 * p] = low(OF(x, p)), value[2 * p + 1] = high(OF(x, p));
}

#if SOURCE == SWIGLU
__device__ __forceinline__ void activation(Tile &tile, const Place &at, const Arguments &a) {
#if STASH
  u8 *codes = a.stash_codes + stash_eight(at, 0, 0, a);
  u16 *scales[2] = {a.stash_scales + stash_block(at, 0, 0, a), a.stash_scales + stash_block(at, 0, 1, a)};
#endif
#pragma unroll
  for (int i = 0; i < 8; i++) {
    float gate[8], up[8];
    const uint4 packed_gate = eight(a.x, at, i, 2 * a.columns), packed_up = eight(a.x + a.columns, at, i, 2 * a.columns);
    unpack(gate, packed_gate);
    unpack(up, packed_up);
#if STASH
    keep_in_8_bits(packed_gate, codes, scales[0] + 4 * i, (at.lane & 3) == 0);
    keep_in_8_bits(packed_up, codes + a.columns, scales[1] + 4 * i, (at.lane & 3) == 0);
    codes += 2 * a.columns;
#endif
#pragma unroll
    for (int p = 0; p < 4; p++)
      tile.pair[i][p] = round_pair(product(gate[2 * p], up[2 * p]), product(gate[2 * p + 1], up[2 * p + 1]));
  }
}
#elif SOURCE == SWIGLU_BACKWARD || SOURCE == SWIGLU_BACKWARD_Y
// A thread's rows of what the backward reads, once, in shared memory that no other thread touches, and in their place
// its results: registers for one tile at a time are what lets two programs on a multiprocessor hide each other's
// waiting, and each sigmoid is computed once.
extern __shared__ uint4 staged[];  // [3][8][256]: dy, gate and up, or dy and the codes of both; then y, dgate, dup

struct Inputs {
#if STASH
  u32 scales[8];  // of gate, low, and of up
#endif
  __device__ __forceinline__ uint4 *slot(int which, int i) const { return staged + (which * 8 + i) * 256 + threadIdx.x; }

  __device__ __forceinline__ Inputs(const Place &at, const Arguments &a) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const size_t row = (size_t)at.tile_m * 128 + at.first_row + i;
      const size_t column = at.tile_k * 128 + at.first_column;
      copy_16(slot(0, i), a.dy + row * a.columns + column);
#pragma unroll
      for (int which = 0; which < 2; which++) {
#if STASH
        copy_8((uint2 *)slot(1, i) + which, a.stash_codes + stash_eight(at, i, which, a));
#else
        copy_16(slot(1 + which, i), a.x + row * 2 * a.columns + which * a.columns + column);
#endif
      }
#if STASH
      scales[i] = __ldg(a.stash_scales + stash_block(at, i, 0, a)) |
                  ((u32)__ldg(a.stash_scales + stash_block(at, i, 1, a)) << 16);
#endif
    }
    commit_copies();
    wait_for_copies<0>();
  }

  // The inputs become y (slot 0), the gradient of the gate (1) and of up (2).
  __device__ __forceinline__ void compute() const {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      float gate[8], up[8], dy[8];
      unpack(dy, *slot(0, i));
      const uint4 first = *slot(1, i);
#if STASH
      out_of_8_bits(gate, make_uint2(first.x, first.y), low(scales[i]));
      out_of_8_bits(up, make_uint2(first.z, first.w), high(scales[i]));
#else
      unpack(gate, first);
      unpack(up, *slot(2, i));
#endif
      u32 y[4], dgate[4], dup[4];
#pragma unroll
      for (int p = 0; p < 4; p++) {
        float of_y[2], of_gate[2], of_up[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int j = 2 * p + h;
          const float sigmoid = sigmoid_of(gate[j]);
          of_y[h] = gate[j] * sigmoid * up[j];
          of_gate[h] = dy[j] * up[j] * sigmoid * (1.0f + gate[j] * (1.0f - sigmoid));
          of_up[h] = dy[j] * gate[j] * sigmoid;
        }
        y[p] = round_pair(of_y[0], of_y[1]);
        dgate[p] = round_pair(of_gate[0], of_gate[1]);
        dup[p] = round_pair(of_up[0], of_up[1]);
      }
#if SOURCE == SWIGLU_BACKWARD_Y
      *slot(0, i) = make_uint4(y[0], y[1], y[2], y[3]);
#endif
      *slot(1, i) = make_uint4(dgate[0], dgate[1], dgate[2], dgate[3]);
      *slot(2, i) = make_uint4(dup[0], dup[1], dup[2], dup[3]);
    }
  }

  __device__ __forceinline__ void result(Tile &tile, int which) const {
    asm volatile("" ::: "memory");  // or the compiler keeps all three tiles in registers, and spills them
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const uint4 packed = *slot(which, i);
#pragma unroll
      for (int p = 0; p < 4; p++) tile.pair[i][p] = OF(packed, p);
    }
  }
};
#endif

__device__ __forceinline__ void store(const Tile &tile, const Place &at, const Arguments &a, int columns) {
  keep(tile, at, a.kept, columns);
#if ROWS
  store_rows(tile, at, a.row_codes, a.row_scales, columns, a.row_stride);
#endif
#if COLUMNS
  store_columns(tile, at, a.column_codes, a.column_scales, a.rows, a.column_stride);
#endif
}

extern "C" __global__ void __launch_bounds__(256, BLOCKS) cast_tiles(const Arguments a) {
  Tile tile;
#if SOURCE == PLAIN
  const Place at(blockIdx.y, blockIdx.x);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    uint4 x = eight(a.x, at, i, a.columns);
#pragma unroll
    for (int p = 0; p < 4; p++) tile.pair[i][p] = OF(x, p);
  }
#if TOTAL
  sum_columns(tile, at, a.totals, a.columns);
#endif
  store(tile, at, a, a.columns);
#elif SOURCE == SWIGLU
  const Place at(blockIdx.y, blockIdx.x);
  activation(tile, at, a);
  store(tile, at, a, a.columns);
#elif SOURCE == RMSNORM
  const Place at(blockIdx.y, blockIdx.x);
  const uint4 gain = __ldg((const uint4 *)(a.gain + at.tile_k * 128 + at.first_column));
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const float r = __ldg(a.rstd + at.tile_m * 128 + at.first_row + i);
    uint4 x = eight(a.x, at, i, a.columns);
#pragma unroll
    for (int p = 0; p < 4; p++)
      tile.pair[i][p] = round_pair(low(OF(x, p)) * r * low(OF(gain, p)), high(OF(x, p)) * r * high(OF(gain, p)));
  }
  store(tile, at, a, a.columns);
#else
  const Place at(blockIdx.y, blockIdx.x);
  const Inputs in(at, a);
  in.compute();
#if SOURCE == SWIGLU_BACKWARD_Y
  in.result(tile, 0);
  store_columns(tile, at, a.y_codes, a.y_scales, a.rows, a.y_stride);
#endif
  Place to = at;
  in.result(tile, 1);
  store(tile, to, a, 2 * a.columns);
  in.result(tile, 2);
  to.tile_k += a.columns / 128;
  store(tile, to, a, 2 * a.columns);
#endif
}
