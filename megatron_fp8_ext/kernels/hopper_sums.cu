// Sums of the columns of partial sums, FP32 `[rows, columns]`: what the gradient of a gain or a bias ends with.
// After hopper.cuh. Macros: HALF (the result is BF16, rounded once), ADD (to what is there).

struct Arguments {
  const float *parts;
  void *total;
  int rows, columns;
};

#define GROUPS 32

// A program for 32 columns: a warp reads every 32nd row, four at a time, so that reads do not wait for each other.
extern "C" __global__ void __launch_bounds__(GROUPS * 32) sum_rows(const Arguments a) {
  __shared__ float of_group[GROUPS][32];
  const int lane = threadIdx.x & 31, group = threadIdx.x >> 5, column = blockIdx.x * 32 + lane;
  const float *from = a.parts + column;
  float total = 0.0f;
  int row = group;
  for (; row + 3 * GROUPS < a.rows; row += 4 * GROUPS) {
    float value[4];
#pragma unroll
    for (int i = 0; i < 4; i++) value[i] = __ldg(from + (size_t)(row + i * GROUPS) * a.columns);
#pragma unroll
    for (int i = 0; i < 4; i++) total += value[i];
  }
  for (; row < a.rows; row += GROUPS) total += __ldg(from + (size_t)row * a.columns);
  of_group[group][lane] = total;
  __syncthreads();
  if (group) return;
#pragma unroll
  for (int other = 1; other < GROUPS; other++) total += of_group[other][lane];
#if HALF
  u16 *to = (u16 *)a.total + column;
  if (ADD) total += low(*to);
  *to = (u16)round_pair(total, 0.0f);
#else
  float *to = (float *)a.total + column;
  if (ADD) total += *to;
  *to = total;
#endif
}
