// What the CUDA C++ kernels need of a GPU, on a CPU: one block after the other, a fiber for each thread. Instructions
// that have a name in PTX alone are functions here, put in by cuda_on_cpu.py. For tests.

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct Index { unsigned x, y, z; };
static Index blockIdx, blockDim, gridDim;
static constexpr int MAX_THREADS = 1024;
static Index indices[MAX_THREADS];
static int running;
#define threadIdx (indices[running])

static ucontext_t scheduler, fibers[MAX_THREADS];
static bool ended[MAX_THREADS];
static uint64_t exchange[MAX_THREADS];
struct Barrier { int arrived, generation; };
static Barrier of_block, of_warp[MAX_THREADS / 32];

inline void yield() {
  const int self = running;
  swapcontext(&fibers[self], &scheduler);
}

inline void meet(Barrier &barrier, int parties) {
  const int generation = barrier.generation;
  if (++barrier.arrived == parties) {
    barrier.arrived = 0;
    barrier.generation++;
  } else {
    while (barrier.generation == generation) yield();
  }
}

inline void __syncthreads() { meet(of_block, blockDim.x); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  Barrier &warp = of_warp[threadIdx.x / 32];
  memcpy(&exchange[threadIdx.x], &value, sizeof value);
  meet(warp, 32);
  T other;
  memcpy(&other, &exchange[threadIdx.x ^ mask], sizeof other);
  meet(warp, 32);
  return other;
}

inline float __uint_as_float(unsigned bits) { float x; memcpy(&x, &bits, 4); return x; }
inline unsigned __float_as_uint(float x) { unsigned bits; memcpy(&bits, &x, 4); return bits; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
template <typename T> T __ldg(const T *p) { return *p; }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned how) {
  const uint64_t both = ((uint64_t)b << 32) | a;
  unsigned out = 0;
  for (int i = 0; i < 4; i++) out |= ((both >> (8 * ((how >> (4 * i)) & 7))) & 0xFF) << (8 * i);
  return out;
}
inline int min(int a, int b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }

inline float flush(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }
inline float exp2_ftz(float x) { return flush(exp2f(flush(x))); }
inline float rcp_ftz(float x) { return flush(1.0f / flush(x)); }
inline unsigned bf16(float x) {
  const unsigned bits = __float_as_uint(x);
  if (std::isnan(x)) return 0x7FFF;
  return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
}
inline unsigned bf16x2(float high, float low) { return (bf16(high) << 16) | bf16(low); }
inline unsigned larger_half(unsigned a, unsigned b, bool nan_wins) {
  const float x = __uint_as_float(a << 16), y = __uint_as_float(b << 16);
  if (std::isnan(x) || std::isnan(y)) {
    if (nan_wins || (std::isnan(x) && std::isnan(y))) return 0x7FFF;
    return std::isnan(x) ? b : a;
  }
  return x > y ? a : b;
}
inline unsigned larger_halves(unsigned a, unsigned b, bool nan_wins) {
  return (larger_half(a >> 16, b >> 16, nan_wins) << 16) | larger_half(a & 0xFFFF, b & 0xFFFF, nan_wins);
}
inline unsigned e4m3(float x) {
  if (std::isnan(x)) return 0x7F;
  const unsigned sign = std::signbit(x) ? 0x80 : 0;
  const float size = fminf(fabsf(x), 448.0f);
  int exponent;
  frexpf(size, &exponent);  // size = m 2^exponent, m in [0.5, 1)
  const float step = ldexpf(1.0f, std::max(exponent - 4, -9));
  const float rounded = nearbyintf(size / step) * step;
  if (rounded == 0) return sign;
  frexpf(rounded, &exponent);
  if (exponent - 1 < -6) return sign | (unsigned)(rounded * 512.0f);
  return sign | ((unsigned)(exponent + 6) << 3) | ((unsigned)(rounded / ldexpf(1.0f, exponent - 4)) & 7);
}
inline unsigned short e4m3x2(float high, float low) { return (unsigned short)((e4m3(high) << 8) | e4m3(low)); }
