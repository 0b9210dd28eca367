// QKV as the GEMM gives it, `[tokens, groups, q + 2, HEAD]`, to rotated queries, rotated keys and values, each in one
// piece; backward the same way back. After hopper.cuh. Macros from hopper.py: HEAD, BACKWARD.
//
// A thread has eight columns of the first half of a head and the eight that they are rotated with.

struct Arguments {
  u16 *qkv, *q, *k, *v;
  const float *cosine, *sine;  // [positions, HEAD / 2]
  int groups, queries, batch;  // queries of a group; sequences side by side in a row of positions
};

#define PER_HEAD (HEAD / 16)

__device__ __forceinline__ void rotate(uint4 &first, uint4 &second, const float *cosine, const float *sine) {
  u32 *a = (u32 *)&first, *b = (u32 *)&second;
#pragma unroll
  for (int p = 0; p < 4; p++) {
    const float2 c = __ldg((const float2 *)cosine + p);
    float2 s = __ldg((const float2 *)sine + p);
    if (BACKWARD) s.x = -s.x, s.y = -s.y;
    const float x0 = low(a[p]), x1 = high(a[p]), y0 = low(b[p]), y1 = high(b[p]);
    a[p] = round_pair(x0 * c.x - y0 * s.x, x1 * c.y - y1 * s.y);
    b[p] = round_pair(y0 * c.x + x0 * s.x, y1 * c.y + x1 * s.y);
  }
}

extern "C" __global__ void rotate_qkv(const Arguments a) {
  const int token = blockIdx.x, heads = a.groups * (a.queries + 2);
  for (int index = threadIdx.x; index < heads * PER_HEAD; index += blockDim.x) {
    const int head = index / PER_HEAD, column = index % PER_HEAD * 8;
    const int group = head / (a.queries + 2), member = head % (a.queries + 2);
    u16 *mixed = a.qkv + ((size_t)token * heads + head) * HEAD + column;
    u16 *apart;
    if (member < a.queries)
      apart = a.q + ((size_t)token * a.groups * a.queries + group * a.queries + member) * HEAD;
    else
      apart = (member == a.queries ? a.k : a.v) + ((size_t)token * a.groups + group) * HEAD;
    apart += column;
    const u16 *from = BACKWARD ? apart : mixed;
    u16 *to = BACKWARD ? mixed : apart;
    uint4 first = *(const uint4 *)from, second = *(const uint4 *)(from + HEAD / 2);
    if (member <= a.queries) {
      const size_t row = (size_t)(token / a.batch) * (HEAD / 2) + column;
      rotate(first, second, a.cosine + row, a.sine + row);
    }
    *(uint4 *)to = first;
    *(uint4 *)(to + HEAD / 2) = second;
  }
}
