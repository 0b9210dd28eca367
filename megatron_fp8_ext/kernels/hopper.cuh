// What the kernels share: BF16 pairs, E4M3 codes, and the scale of a block. Macro: POWER_OF_TWO.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xFFFF0000u); }

__device__ __forceinline__ u32 round_pair(float first, float second) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

// The larger of each half; a NaN loses.
__device__ __forceinline__ u32 larger(u32 a, u32 b) {
  u32 out;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  return out;
}

__device__ __forceinline__ u32 magnitude(u32 pair) { return pair & 0x7FFF7FFFu; }

__device__ __forceinline__ u32 encode(float a, float b, float c, float d) {
  u16 first, second;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(first) : "f"(b), "f"(a));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(second) : "f"(d), "f"(c));
  return first | ((u32)second << 16);
}

__device__ __forceinline__ float reciprocal(float x) {
  float out;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

// 1 / (1 + e^-x). Numbers below 2^-126 count as zero: to keep them costs six instructions more.
__device__ __forceinline__ float sigmoid_of(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * -1.4426950408889634f));
  return reciprocal(1.0f + power);
}

// `scale_of` of cast.py; `amax` as the bits of an FP32 number, a NaN counts as zero.
__device__ __forceinline__ void scale_of(u32 amax, float &scale, float &inverse) {
#if POWER_OF_TWO
  int exponent = (amax + 0x1FFFFFu) >> 23;
  int biased = min(262 - exponent, 254);
  scale = __uint_as_float((u32)biased << 23);
  inverse = __uint_as_float(biased == 254 ? 0x00400000u : (u32)(254 - biased) << 23);
#else
  scale = __fdiv_rn(448.0f, __uint_as_float(amax));
  if (scale == __uint_as_float(0x7F800000u)) scale = __uint_as_float(0x7F7F0000u);  // BF16's largest
  inverse = __fdiv_rn(1.0f, scale);
#endif
  if (amax == 0 || amax >= 0x7F800000u) scale = inverse = 1.0f;
}

// Copies from memory to shared memory that a thread does not wait for until it says so.
__device__ __forceinline__ void copy_16(uint4 *to, const void *from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void copy_8(uint2 *to, const void *from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void copy_4(float *to, const void *from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `LATER` of the groups committed last are on their way.
template <int LATER>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LATER) : "memory");
}
