// Products of a warpgroup on a CPU, and the launch of a kernel in clusters. After hopper_on_cpu.hpp. A product reads
// shared memory some time between its issue and the wait for it; until then its accumulators are not a number.

struct Product { u64 a, b; bool add; int joined, waited; bool done; };
struct Warpgroup {
  std::vector<Product> products;
  size_t computed;
  float sums[64][128];
};
static Warpgroup warpgroups[MAX_THREADS / 128];
static size_t issued[MAX_THREADS], grouped[MAX_THREADS], waited[MAX_THREADS];
static float *accumulators[MAX_THREADS];
static bool fenced[MAX_THREADS];
static float e4m3_values[256];

inline void pin(float (&)[64]) {}
inline int row_of(int thread, int i) { return thread % 128 / 32 * 16 + thread % 32 / 4 + (i & 2) * 4; }
inline int column_of(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + (i & 1); }

// Where byte k of row r lies, of a K-major matrix: 8x16 bytes, or rows of 128 in a swizzle that repeats every 1024.
inline u32 element_at(u64 matrix, int r, int k) {
  const u32 start = (matrix & 0x3FFF) << 4, stride = (matrix >> 32 & 0x3FFF) << 4;
  const u32 leading = (matrix >> 16 & 0x3FFF) << 4;
  if (matrix >> 62 == 0) return start + r / 8 * stride + r % 8 * 16 + k / 16 * leading + k % 16;
  return swizzled(start + r / 8 * stride + r % 8 * 128 + k);
}
inline void check_matrix(u64 matrix) {
  const u32 start = (matrix & 0x3FFF) << 4, mode = matrix >> 62;
  if (mode > 1) fail("swizzle mode %u is not emulated", mode);
  if (matrix >> 49 & 7) fail("base offset is not emulated");
  if (mode == 1 && (start & ~127u) % 1024) fail("the swizzle's pattern starts at no multiple of 1024: %u", start);
}
__attribute__((optimize("O3"))) inline void compute(int group, const Product &product) {
  Warpgroup &all = warpgroups[group];
  const int block = group * 128 / block_threads;
  static float a[64][32], b[32][128];
  auto read = [block](u64 matrix, int r, int k) {
    const u32 at = element_at(matrix, r, k) - WINDOW;
    if (at >= SHARED_SIZE) return NAN;
    lines[block][at / LINE].unread = false;
    return e4m3_values[shared_bytes[block][at]];
  };
  for (int r = 0; r < 64; r++)
    for (int k = 0; k < 32; k++) a[r][k] = read(product.a, r, k);
  for (int n = 0; n < 128; n++)
    for (int k = 0; k < 32; k++) b[k][n] = read(product.b, n, k);
  if (!product.add) memset(all.sums, 0, sizeof all.sums);
  for (int r = 0; r < 64; r++)
    for (int k = 0; k < 32; k++)
      for (int n = 0; n < 128; n++) all.sums[r][n] += a[r][k] * b[k][n];
}
inline void compute_until(int group, size_t end) {
  Warpgroup &all = warpgroups[group];
  for (; all.computed < end; all.computed++) compute(group, all.products[all.computed]);
}

inline void mma_begin() { fenced[running] = true; }
inline void mma_commit() {
  grouped[running] = issued[running], fenced[running] = false;
  let_others();
}
inline void mma_64x128x32(float (&d)[64], u64 a, u64 b, bool add) {
  const int group = running / 128;
  Warpgroup &all = warpgroups[group];
  if (!fenced[running]) fail("a product with no wgmma.fence before it");
  check_matrix(a), check_matrix(b);
  if (accumulators[running] && accumulators[running] != d) fail("one set of accumulators at a time is emulated");
  if (add && !accumulators[running]) fail("adding to what no product in flight made is not emulated");
  accumulators[running] = d;
  for (float &x : d) x = NAN;
  const size_t mine = issued[running]++;
  if (mine == all.products.size()) all.products.push_back({a, b, add, 0, 0, false});
  Product &product = all.products[mine];
  if (product.a != a || product.b != b || product.add != add) fail("threads of a warpgroup disagree on a product");
  progress++;
  if (++product.joined == 128 && one_in(2)) compute_until(group, mine + 1);
}
inline void mma_wait() {
  const int group = running / 128;
  Warpgroup &all = warpgroups[group];
  const size_t end = grouped[running];
  wait_until([&all, end] { return end == 0 || all.products[end - 1].joined == 128; });
  if (!accumulators[running]) return;
  compute_until(group, end);
  for (int i = 0; i < 64; i++)
    accumulators[running][i] = all.sums[row_of(running, i)][column_of(running, i)];
  accumulators[running] = nullptr;
  for (; waited[running] < end; waited[running]++) {
    Product &product = all.products[waited[running]];
    product.done = ++product.waited == 128;
  }
}
// The descriptors' ranges of products that a warp may still wait for.
bool multiplied(int block, u32 first, u32 bytes) {
  for (int group = block * block_threads / 128; group < (block + 1) * block_threads / 128; group++) {
    const std::vector<Product> &products = warpgroups[group].products;
    for (size_t i = products.size(); i-- > 0 && !products[i].done;)
      for (const auto &[matrix, rows] : {std::pair{products[i].a, 64}, {products[i].b, 128}}) {
        const u32 start = ((matrix & 0x3FFF) << 4 & ~127u) - WINDOW;
        if (start < first + bytes && first < start + rows * 128) return true;
      }
  }
  return false;
}

static void (*entry)();
static void begin() {
  entry();
  if (committed[running] || uncommitted[running]) fail("ended before its stores");
  ended[running] = true, progress++;
  while (true) yield();
}

static void start(int blocks, int threads) {
  for (int code = 0; code < 256; code++) {
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    const float size = exponent ? ldexpf(8 + mantissa, exponent - 10) : ldexpf(mantissa, -9);
    e4m3_values[code] = (code & 127) == 127 ? NAN : code & 128 ? -size : size;
  }
  static std::vector<char> stacks(MAX_THREADS * 65536);
  block_threads = threads, cluster_blocks = blocks;
  memset(shared_bytes, 0xFF, sizeof shared_bytes);  // not a number
  memset(lines, 0, sizeof lines), memset(writers, 0, sizeof writers), memset(barriers, 0, sizeof barriers);
  memset(named, 0, sizeof named), memset(of_warps, 0, sizeof of_warps), of_cluster = {};
  copies.clear();
  for (auto &group : warpgroups) group = {};
  for (int block = 0; block < blocks; block++) pool[block] = 0;
  for (int t = 0; t < blocks * threads; t++) {
    indices[t] = {(unsigned)(t % threads), 0, 0};
    ended[t] = fenced[t] = false, blocked[t] = nullptr, accumulators[t] = nullptr;
    issued[t] = grouped[t] = waited[t] = committed[t] = uncommitted[t] = 0;
    owned[t] = 65536 / threads / 8 * 8;
    getcontext(&fibers[t]);
    fibers[t].uc_stack.ss_sp = stacks.data() + t * 65536;
    fibers[t].uc_stack.ss_size = 65536;
    fibers[t].uc_link = &scheduler;
    makecontext(&fibers[t], begin, 0);
  }
}

// Warps in random order, some not at all in a round, those of some warpgroups seldom.
static int paces[MAX_THREADS / 128];
static void run_round(int threads) {
  std::vector<int> warps;
  for (int warp = 0; warp < threads / 32; warp++) warps.push_back(warp);
  for (size_t i = warps.size(); i-- > 1;) std::swap(warps[i], warps[(one_in(1), random_state % (i + 1))]);
  for (int warp : warps) {
    if (one_in(4) || !one_in(paces[warp / 4])) continue;
    for (running = warp * 32; running < warp * 32 + 32 && !failure[0]; running++) {
      if (ended[running] || (blocked[running] && !blocked[running]())) continue;
      blocked[running] = nullptr;
      swapcontext(&scheduler, &fibers[running]);
    }
  }
}

// What went wrong, or nothing.
static const char *launch_clusters(void (*kernel)(), int grid, int threads, int cluster, long seed) {
  entry = kernel;
  failure[0] = 0, random_state = 0x9E3779B97F4A7C15u * (seed + 1);
  gridDim = {(unsigned)grid, 1, 1}, blockDim = {(unsigned)threads, 1, 1};
  for (first_block = 0; first_block < grid && !failure[0]; first_block += cluster) {
    start(cluster, threads);
    for (int &pace : paces) pace = one_in(3) ? 20 : 1;
    long before = progress;
    for (int idle = 0, left = 1; left && !failure[0];) {
      run_round(cluster * threads);
      do_copies();
      left = 0;
      for (int t = 0; t < cluster * threads; t++) left += !ended[t];
      idle = progress == before && copies.empty() ? idle + 1 : 0, before = progress;
      if (idle == 1000) snprintf(failure, sizeof failure, "%d threads wait for each other", left);
    }
    if (!failure[0] && copies.size()) snprintf(failure, sizeof failure, "copies were left over");
    for (auto &block : lines)
      for (auto &line : block)
        if (!failure[0] && line.unread) snprintf(failure, sizeof failure, "a copy was never read");
  }
  return failure;
}
