// RMSNorm of BF16 rows: forward with the row-wise E4M3 cast of its result, and backward. Forms of the Triton kernels
// in rmsnorm.py for rows of whole 128-column blocks. After hopper.cuh. Macros from hopper.py: COLUMNS (of a row),
// POWER_OF_TWO, KEEP (store the BF16 result too), BACKWARD, RESIDUAL (add `past` to the backward's result), STAGES
// (rows of the backward in shared memory).

struct Arguments {
  const u16 *x, *dy, *gain;
  float *rstd;
  u8 *row_codes;
  float *row_scales;
  u16 *kept;
  const u16 *past;
  u16 *dx;
  float *dweight;
  int rows, row_stride;
  float eps;
};

#define OF(vector, p) (p == 0 ? vector.x : p == 1 ? vector.y : p == 2 ? vector.z : vector.w)

__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
  for (int other = 16; other > 0; other >>= 1) x += __shfl_xor_sync(~0u, x, other);
  return x;
}

#if !BACKWARD
// A warp for a row, which stays in registers: a step is 256 columns, two blocks, eight columns of a lane.
#define STEPS ((COLUMNS + 255) / 256)

extern "C" __global__ void __launch_bounds__(256) rmsnorm_rows(const Arguments a) {
  const int lane = threadIdx.x & 31, row = blockIdx.x * 8 + (threadIdx.x >> 5);
  if (row >= a.rows) return;
  const u16 *x = a.x + (size_t)row * COLUMNS + lane * 8;
  uint4 value[STEPS];
  float squares = 0.0f;
#pragma unroll
  for (int step = 0; step < STEPS; step++) {
    const bool inside = step * 256 + lane * 8 < COLUMNS;
    value[step] = inside ? __ldg((const uint4 *)(x + step * 256)) : make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int p = 0; p < 4; p++) {
      const float first = low(OF(value[step], p)), second = high(OF(value[step], p));
      squares += first * first + second * second;
    }
  }
  const float inverse = __fdiv_rn(1.0f, __fsqrt_rn(sum_of_warp(squares) / COLUMNS + a.eps));
  if (lane == 0) a.rstd[row] = inverse;
#pragma unroll
  for (int step = 0; step < STEPS; step++) {
    const int column = step * 256 + lane * 8;
    const bool inside = column < COLUMNS;
    const uint4 gain = inside ? __ldg((const uint4 *)(a.gain + column)) : make_uint4(0, 0, 0, 0);
    u32 y[4], amax = 0;
#pragma unroll
    for (int p = 0; p < 4; p++) {
      const u32 v = OF(value[step], p), g = OF(gain, p);
      y[p] = round_pair(low(v) * inverse * low(g), high(v) * inverse * high(g));
      amax = larger(amax, magnitude(y[p]));
    }
    amax = larger(amax, __byte_perm(amax, amax, 0x1032));
#pragma unroll
    for (int other = 8; other > 0; other >>= 1) amax = larger(amax, __shfl_xor_sync(~0u, amax, other));
    float s, back;
    scale_of(amax << 16, s, back);
    if (inside) {
      uint2 word;
      word.x = encode(low(y[0]) * s, high(y[0]) * s, low(y[1]) * s, high(y[1]) * s);
      word.y = encode(low(y[2]) * s, high(y[2]) * s, low(y[3]) * s, high(y[3]) * s);
      *(uint2 *)(a.row_codes + (size_t)row * COLUMNS + column) = word;
#if KEEP
      *(uint4 *)(a.kept + (size_t)row * COLUMNS + column) = make_uint4(y[0], y[1], y[2], y[3]);
#endif
      if ((lane & 15) == 0) a.row_scales[(size_t)(column / 128) * a.row_stride + row] = back;
    }
  }
}

#else
// A program for rows program, program + programs, ...; a thread for eight columns, whose part of the weight's gradient
// it sums. The next STAGES - 1 rows are on their way to shared memory, of which no thread touches another's.
#define WARPS ((COLUMNS / 8 + 31) / 32)
#define THREADS (WARPS * 32)
#define PARTS (2 + RESIDUAL)

extern __shared__ uint4 staged[];  // [STAGES][dy, x, past][THREADS], then rstd [STAGES][THREADS]

__device__ __forceinline__ uint4 *slot(int stage, int part) {
  return staged + (stage * PARTS + part) * THREADS + threadIdx.x;
}
__device__ __forceinline__ float *slot_of_rstd(int stage) {
  return (float *)(staged + STAGES * PARTS * THREADS) + stage * THREADS + threadIdx.x;
}

__device__ __forceinline__ void fetch(const Arguments &a, int stage, int row, int column) {
  if (row < a.rows && column < COLUMNS) {
    const size_t at = (size_t)row * COLUMNS + column;
    copy_16(slot(stage, 0), a.dy + at);
    copy_16(slot(stage, 1), a.x + at);
#if RESIDUAL
    copy_16(slot(stage, 2), a.past + at);
#endif
    copy_4(slot_of_rstd(stage), a.rstd + row);
  }
  commit_copies();
}

extern "C" __global__ void __launch_bounds__(THREADS) rmsnorm_rows(const Arguments a) {
  __shared__ float partial[2][32];
  const int column = threadIdx.x * 8, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const bool inside = column < COLUMNS;
  const uint4 none = make_uint4(0, 0, 0, 0);
  float gain[8], total[8];
  {
    const uint4 packed = inside ? __ldg((const uint4 *)(a.gain + column)) : none;
#pragma unroll
    for (int p = 0; p < 4; p++) gain[2 * p] = low(OF(packed, p)), gain[2 * p + 1] = high(OF(packed, p));
  }
#pragma unroll
  for (int j = 0; j < 8; j++) total[j] = 0.0f;
#pragma unroll
  for (int stage = 0; stage < STAGES - 1; stage++) fetch(a, stage, blockIdx.x + stage * gridDim.x, column);
  int stage = 0, turn = 0;
  for (int row = blockIdx.x; row < a.rows; row += gridDim.x, turn ^= 1) {
    fetch(a, (stage + STAGES - 1) % STAGES, row + (STAGES - 1) * gridDim.x, column);
    wait_for_copies<STAGES - 1>();
    const uint4 dy = inside ? *slot(stage, 0) : none, x = inside ? *slot(stage, 1) : none;
#if RESIDUAL
    const uint4 past = inside ? *slot(stage, 2) : none;
#endif
    const float inverse = inside ? *slot_of_rstd(stage) : 0.0f;
    stage = (stage + 1) % STAGES;
    float normal[8], scaled[8], sum = 0.0f;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const float grad = j & 1 ? high(OF(dy, j / 2)) : low(OF(dy, j / 2));
      normal[j] = (j & 1 ? high(OF(x, j / 2)) : low(OF(x, j / 2))) * inverse;
      scaled[j] = grad * gain[j];
      total[j] += grad * normal[j];
      sum += scaled[j] * normal[j];
    }
    sum = sum_of_warp(sum);
    if (lane == 0) partial[turn][warp] = sum;
    __syncthreads();
    sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += partial[turn][w];
    const float mean = sum / COLUMNS;
    uint4 out;
    float result[8];
#pragma unroll
    for (int j = 0; j < 8; j++) {
      result[j] = inverse * (scaled[j] - normal[j] * mean);
#if RESIDUAL
      result[j] += j & 1 ? high(OF(past, j / 2)) : low(OF(past, j / 2));
#endif
    }
    out.x = round_pair(result[0], result[1]);
    out.y = round_pair(result[2], result[3]);
    out.z = round_pair(result[4], result[5]);
    out.w = round_pair(result[6], result[7]);
    if (inside) *(uint4 *)(a.dx + (size_t)row * COLUMNS + column) = out;
  }
  if (inside) {
    float4 *to = (float4 *)(a.dweight + (size_t)blockIdx.x * COLUMNS + column);
    to[0] = make_float4(total[0], total[1], total[2], total[3]);
    to[1] = make_float4(total[4], total[5], total[6], total[7]);
  }
}
#endif
