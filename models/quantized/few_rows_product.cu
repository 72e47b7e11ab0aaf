// The product of few rows with a kernel in four bits (`tiled_kernels.py`) on an NVIDIA GPU, from
// Ampere on: at the speed of the kernel's bytes.
//
// With few rows the tensor cores have next to nothing to do, and what a thread does for each word
// of codes decides. So weights are the left side of a product of 16 outputs x 16 inputs x 8 rows,
// whose layout of registers is that of the words: a shift and a mask make two codes of a word, as
// 128 + code in bfloat16, and neither scale nor offset is applied to a weight. With them summed in
// float32 over a group,
//
//     sum of (scale * (code - 8) + offset) * x
//         = scale * sum of (128 + code) * x  +  (scale, offset) . (-136 * sum of x, sum of x)
//
// of which the latter is a product, too, whose left side are the pairs of the kernel as they lie.
//
// A warp has some outputs, and shares their inputs with the others of its block. What it reads lies
// in a ring in shared memory that nobody else touches, so it waits for nobody before the end, where
// the warps' sums are added in their order.
//
// Where outputs are gates and as many ups, it can gate: then half of a block's groups of warps have
// gates and the others the ups that belong to them, and what is written is silu(gate) * up.
//
// It is compiled by NVRTC with TILES of 16 outputs a warp, GROUPS_OF_WARPS with outputs of their
// own, SHARES of the inputs, STAGES places for blocks of 128 inputs in the ring of a warp, at most
// ROWS rows, and IS_GATED, for which groups are even in number.

constexpr int kEights = (ROWS + 7) / 8;  // of rows
constexpr int kWords = TILES * 1024, kPairs = TILES * 256, kStage = kWords + kPairs + ROWS * 256;
constexpr int kOwn = 16 * TILES, kOutputs = kOwn * GROUPS_OF_WARPS;
constexpr int kWritten = IS_GATED ? kOutputs / 2 : kOutputs;  // of a row
constexpr int kThreads = 32 * GROUPS_OF_WARPS * SHARES;
constexpr unsigned kOnes = 0x3f803f80, kLess = 0xc308c308;  // 1 and -136, twice

// What is read once; other things stay in the cache rather.
__device__ __forceinline__ void copy(unsigned to, const uint4* from, unsigned long long policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;"
               ::"r"(to), "l"(from), "l"(policy) : "memory");
}

__device__ __forceinline__ void copy_through_cache(unsigned to, const uint4* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// Adds 16 outputs x 16 inputs times 16 inputs x 8 rows. Of a thread's registers the left side has
// outputs g and g + 8 (g is a quarter of the lane's number) in turn, the right side row g.
__device__ __forceinline__ void multiply(float (&sums)[4], const unsigned (&left)[4],
                                         unsigned right0, unsigned right1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1));
}

// The same with 8 inputs.
__device__ __forceinline__ void multiply(float (&sums)[4], uint2 left, unsigned right) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(left.x), "r"(left.y), "r"(right));
}

// 128 + code of a part of a word of each half.
__device__ __forceinline__ unsigned codes(unsigned words, int part) {
  unsigned found;
  asm("lop3.b32 %0, %1, 0x000f000f, %2, 0xea;"
      : "=r"(found) : "r"(words >> 4 * part), "r"(0x43004300));
  return found;
}

__device__ __forceinline__ unsigned rounded(float low, float high) {
  unsigned pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ float lower(unsigned pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float upper(unsigned pair) {
  return __uint_as_float(pair & 0xffff0000u);
}

// What two sums lack when they are rounded to bfloat16, rounded.
__device__ __forceinline__ unsigned rest(float low, float high, unsigned pair) {
  return rounded(low - lower(pair), high - upper(pair));
}

// silu(gate) * up, of both as they are rounded.
__device__ __forceinline__ float gated(float gate, float up) {
  const float wide = lower(rounded(gate, 0));
  return wide / (1 + __expf(-wide)) * lower(rounded(up, 0));
}

// Has a number computed once, where the compiler would do so again for every block.
__device__ __forceinline__ void keep(int& number) { asm("" : "+r"(number)); }

extern "C" __global__ void __launch_bounds__(kThreads, 1) few_rows_product(
    const uint4* __restrict__ x, const uint4* __restrict__ words, const uint4* __restrict__ pairs,
    void* __restrict__ out, int num_rows, int blocks, int outputs, int groups, int is_wide) {
  extern __shared__ __align__(128) unsigned char memory[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int share = warp / GROUPS_OF_WARPS;
  const int width = IS_GATED ? outputs / 2 : outputs;
  // The last ones compute what others do as well rather than less.
  const int first = min(static_cast<int>(blockIdx.x) * kWritten, width - kWritten);
  const int within = warp % GROUPS_OF_WARPS * kOwn;
  const int own = first + within + (IS_GATED && within >= kWritten ? width - kWritten : 0);
  unsigned char* const ring = memory + warp * (STAGES * kStage);
  const unsigned ring_at = static_cast<unsigned>(__cvta_generic_to_shared(ring));

  unsigned long long policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));

  // Where the next block is read from. Of words each lane reads 16 bytes of an output; eight lanes
  // later read other halves of them, and so they lie, for reads of all banks at once. Rows of x
  // likewise. A block has one group or several, or a group has several blocks.
  const int of_block = groups / blocks, of_group = of_block ? 1 : blocks / groups;
  const uint4* words_from = words + (static_cast<long long>(share) * outputs + own) * 4 + lane;
  const long long words_step = static_cast<long long>(SHARES) * outputs * 4;
  const uint4* x_from = x + (lane >> 4) * blocks * 16 + (lane & 15) + 16 * share;
  const uint4* pairs_from[(TILES + 1) / 2];
  const long long pairs_step = static_cast<long long>(SHARES) * of_block * outputs / 4;
#pragma unroll
  for (int j = 0; j < (TILES + 1) / 2; ++j) {
    const int chunk = 32 * j + lane, part = chunk / (4 * TILES), within = chunk % (4 * TILES);
    const int group = share * of_block + part * of_block / 4;
    pairs_from[j] = pairs + (static_cast<long long>(group) * outputs + own) / 4 + within;
  }
  int words_to = 16 * (lane ^ (lane >> 3 & 1) * 4), x_to = 16 * (lane ^ (lane >> 4) * 4);
  keep(words_to), keep(x_to);

  auto fetch = [&](int block, unsigned to) {
    if (block < blocks) {
#pragma unroll
      for (int j = 0; j < (ROWS + 1) / 2; ++j)
        if (2 * j + (lane >> 4) < num_rows)
          copy_through_cache(to + kWords + kPairs + x_to + 512 * j, x_from + 32 * j * blocks);
      const long long group_at =
          of_block ? 0 : static_cast<long long>(block / of_group) * outputs / 4;
#pragma unroll
      for (int j = 0; j < (TILES + 1) / 2; ++j) {
        if (TILES % 2 == 0 || 32 * j + lane < 16 * TILES)
          copy(to + kWords + 512 * j + 16 * lane, pairs_from[j] + group_at, policy);
        pairs_from[j] += pairs_step;
      }
#pragma unroll
      for (int j = 0; j < 2 * TILES; ++j)
        copy(to + words_to + 512 * j, words_from + 32 * j, policy);
      words_from += words_step, x_from += 16 * SHARES;
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s) {
    fetch(share + s * SHARES, ring_at + s * kStage);
    __syncthreads();  // no warp asks for its second block before all have for their first
  }

  // Of the 16 outputs of a tile a lane has 2g and 2g + 1, of a group the inputs 8t to 8t + 7.
  int words_at = 16 * ((8 * g + t) ^ (g & 1) * 4);
  int pairs_at = kWords + 8 * g, own_pairs_at = pairs_at + t * kOwn * 4;
  keep(words_at), keep(pairs_at), keep(own_pairs_at);
  float total[TILES][kEights][4] = {};
  uint4 right[kEights][4] = {};
#if ROWS == 1
  // The rows of the right side are the parts of the only one, so that the sums of a part are a
  // column, and what they are multiplied with is done once for all four.
  int x_at = kWords + kPairs + 16 * t, two_pairs_at = pairs_at + (t & 1) * kOwn * 8;
  keep(x_at), keep(two_pairs_at);
  const unsigned factors = g & 1 ? kOnes : kLess;
#else
  int x_at = kWords + kPairs + g * 256 + 16 * t;
  int even_at = x_at + 64 * (g & 1), odd_at = x_at - 64 * (g & 1);
  keep(even_at), keep(odd_at);
#endif

  int slot = 0, to_fill = (STAGES - 1) * kStage;
#pragma unroll 1
  for (int block = share; block < blocks; block += SHARES) {
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
    __syncwarp();
    fetch(block + (STAGES - 1) * SHARES, ring_at + to_fill);
    const unsigned char* const from = ring + slot;
    to_fill = slot;
    slot = slot == (STAGES - 1) * kStage ? 0 : slot + kStage;

    // Sums over the inputs of a group, of row g and part t: -136 times and once. A float32 is the
    // sum of two bfloat16 here, to 16 bits.
    unsigned high[kEights], low[kEights];
#if ROWS == 1
#pragma unroll
    for (int part = 0; part < 4; ++part)
      if (g == part) right[0][part] = *reinterpret_cast<const uint4*>(from + x_at + 64 * part);
    uint4 mine = make_uint4(0, 0, 0, 0);
    if (g < 4) mine = *reinterpret_cast<const uint4*>(from + x_at + 64 * g);
    float sums[4] = {};
    multiply(sums, {mine.x, mine.y, mine.z, mine.w}, factors, factors);
    const float less = __shfl_sync(~0u, sums[0] + sums[2], 4 * t);
    const float sum = __shfl_sync(~0u, sums[1] + sums[3], 4 * t);
    high[0] = g == 0 ? rounded(less, sum) : 0;
    low[0] = g == 0 ? rest(less, sum, high[0]) : 0;
#else
#pragma unroll
    for (int n = 0; n < kEights; ++n) {
      float sums[4] = {};
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        uint4& some = right[n][part];
        if (8 * n + g < num_rows)
          some = *reinterpret_cast<const uint4*>(from + (part & 1 ? odd_at : even_at) + 2048 * n +
                                                 64 * part);
        const unsigned factors = g == 2 * part ? kLess : g == 2 * part + 1 ? kOnes : 0;
        multiply(sums, {some.x, some.y, some.z, some.w}, factors, factors);
      }
      const float less = sums[0] + sums[2], sum = sums[1] + sums[3];
      high[n] = rounded(less, sum);
      low[n] = rest(less, sum, high[n]);
    }
#endif

#pragma unroll
    for (int m = 0; m < TILES; ++m) {
      const uint2 own_pairs = *reinterpret_cast<const uint2*>(from + own_pairs_at + 64 * m);
#pragma unroll
      for (int n = 0; n < kEights; ++n) {
        multiply(total[m][n], own_pairs, high[n]);
        multiply(total[m][n], own_pairs, low[n]);
      }
      const uint4 one = *reinterpret_cast<const uint4*>(from + words_at + 1024 * m);
      const uint4 other = *reinterpret_cast<const uint4*>(from + (words_at ^ 64) + 1024 * m);
      float sums[kEights][4] = {};
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const unsigned left[4] = {codes(one.x, part), codes(other.x, part), codes(one.y, part),
                                  codes(other.y, part)};
        const unsigned more[4] = {codes(one.z, part), codes(other.z, part), codes(one.w, part),
                                  codes(other.w, part)};
#pragma unroll
        for (int n = 0; n < kEights; ++n) {
          multiply(sums[n], left, right[n][part].x, right[n][part].y);
          multiply(sums[n], more, right[n][part].z, right[n][part].w);
        }
#if ROWS > 1
        const uint2 pair =
            *reinterpret_cast<const uint2*>(from + pairs_at + 4 * (part * kOwn + 16 * m));
#pragma unroll
        for (int n = 0; n < kEights; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            total[m][n][i] += lower(i < 2 ? pair.x : pair.y) * sums[n][i];
            sums[n][i] = 0;
          }
#endif
      }
#if ROWS == 1
      const uint2 even = *reinterpret_cast<const uint2*>(from + two_pairs_at + 64 * m);
      const uint2 odd = *reinterpret_cast<const uint2*>(from + two_pairs_at + kOwn * 4 + 64 * m);
      total[m][0][0] += lower(even.x) * sums[0][0];
      total[m][0][1] += lower(odd.x) * sums[0][1];
      total[m][0][2] += lower(even.y) * sums[0][2];
      total[m][0][3] += lower(odd.y) * sums[0][3];
#endif
    }
  }

#if ROWS == 1
#pragma unroll
  for (int m = 0; m < TILES; ++m)
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const float sum = total[m][0][i] + total[m][0][i + 1];
      total[m][0][i] = sum + __shfl_xor_sync(~0u, sum, 1);
    }
#endif
  __syncthreads();  // the rings are done with
  float* const shares = reinterpret_cast<float*>(memory);  // [SHARES][ROWS][kOutputs]
#pragma unroll
  for (int m = 0; m < TILES; ++m)
#pragma unroll
    for (int n = 0; n < kEights; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = 8 * n + 2 * t + (i & 1), output = within + 16 * m + 2 * g + (i >> 1);
        if (row < num_rows) shares[(share * ROWS + row) * kOutputs + output] = total[m][n][i];
      }
  __syncthreads();
  auto added = [&](int at) {
    float sum = shares[at];
#pragma unroll
    for (int k = 1; k < SHARES; ++k) sum += shares[k * ROWS * kOutputs + at];
    return sum;
  };
  for (int i = threadIdx.x; i < num_rows * kWritten; i += kThreads) {
    const int row = i / kWritten, output = i % kWritten;
#if IS_GATED
    const int at = row * kOutputs + output;
    const float sum = gated(added(at), added(at + kWritten));
#else
    const float sum = added(i);
#endif
    const long long place = static_cast<long long>(row) * width + first + output;
    if (is_wide)
      static_cast<float*>(out)[place] = sum;
    else
      static_cast<unsigned short*>(out)[place] = rounded(sum, 0);
  }
}
