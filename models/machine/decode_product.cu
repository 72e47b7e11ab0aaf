// The product of the rows of a decode step with a kernel, on GPUs of the Hopper generation: at the
// speed of the kernel's bytes, or of the tensor cores.
//
//     out[n, o] = sum over i of x[n, i] * kernel[o, i]
//
// Outputs are the left side of the tensor cores' products (`wgmma`), 64 a group of four warps, and
// rows the right side, all of them at once: so each weight is read once. Where outputs are too few
// to give every processor a block, inputs are cut, too, into parts that the blocks of a cluster
// sum. At the end each block adds up some rows of all, in the parts' order, out of the others'
// shared memory. So there is one kernel, no sum goes through global memory, and results are the
// same in each run.
//
// One thread has the copy engine bring a step of inputs at a time to a ring in shared memory; the
// groups multiply them. Weights of 16 bits are multiplied where they lie. Fewer bits become 16 in
// the registers that the left side is taken from, so rows are not rounded:
//
//     four bits   (code - 8) * scale + offset, rounded once; words and pairs of `TiledKernel`
//     eight bits  float8_e4m3fn, with a scale for each output, which the sums are multiplied by;
//                 not for NaN, which is in scales and not among the values
//
// It is compiled by NVRTC with BITS of a weight, ROWS (a multiple of 8, at most 256), GROUPS that
// multiply, STAGES of the ring, IS_BFLOAT16 (rows, else float16; of 16 bits the weights, too), and
// `multiply`, whose text depends on these, before it.

#if IS_BFLOAT16
#define TYPE "bf16"
#else
#define TYPE "f16"
#endif

constexpr int kOutputs = 64 * GROUPS, kThreads = 128 * (GROUPS + 1);
constexpr int kInputs = BITS == 16 ? 64 : 128;                  // of a step
constexpr int kHalf = kOutputs * kInputs * BITS / 16;           // bytes of half the weights
constexpr int kPairs = BITS == 4 ? 4 * kOutputs * 4 : 0;        // and of their pairs, at most
constexpr int kLine = ROWS * 128;                               // of 64 inputs of all rows
constexpr int kStage = 2 * kHalf + kPairs + kInputs / 64 * kLine;
constexpr int kPitch = kOutputs + 4;  // numbers, so that lanes write to different banks

// What the copy engine is told of an array.
struct alignas(64) Map {
  char bytes[128];
};

__device__ __forceinline__ unsigned address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void begin_barrier(unsigned barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void arrive(unsigned barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, for so many bytes that are yet to land.
__device__ __forceinline__ void expect(unsigned barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void wait(unsigned barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred is_done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 is_done, [%0], %1;\n"
      "@!is_done bra again;\n"
      "}" ::"r"(barrier), "r"(parity) : "memory");
}

// Has what a copy will be told of an array brought near.
__device__ __forceinline__ void prepare(const Map& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Has a box of an array copied; what lies outside the array comes as zeros.
__device__ __forceinline__ void copy(unsigned to, const Map& map, int column, int line,
                                     unsigned barrier, unsigned long long policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;"
      ::"r"(to), "l"(&map), "r"(column), "r"(line), "r"(barrier), "l"(policy) : "memory");
}

// A side of a product in shared memory: lines of 128 bytes, of which eight are swizzled together.
__device__ __forceinline__ unsigned long long side(unsigned at) {
  return 1ull << 62 | 64ull << 32 | 1ull << 16 | (at & 0x3ffff) >> 4;
}

// Waits for all threads of a cluster of so many blocks.
__device__ __forceinline__ void wait_for_cluster(int blocks) {
  if (blocks == 1) {
    __syncthreads();
    return;
  }
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// Two numbers rounded.
__device__ __forceinline__ unsigned rounded(float low, float high) {
  unsigned pair;
  asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// What is left of a number when it is rounded.
__device__ __forceinline__ float widened(float number) {
  const unsigned short half = rounded(number, 0);
#if IS_BFLOAT16
  return __uint_as_float(half << 16);
#else
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(half));
  return wide;
#endif
}

// Adds four sums of all parts, in their order.
__device__ __forceinline__ float4 added(const float* own, int parts) {
  float4 total = make_float4(0, 0, 0, 0);
#pragma unroll 4
  for (int part = 0; part < parts; ++part) {
    unsigned theirs;
    float4 some;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(theirs) : "r"(address(own)), "r"(part));
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(some.x), "=f"(some.y), "=f"(some.z), "=f"(some.w) : "r"(theirs));
    total.x += some.x, total.y += some.y, total.z += some.z, total.w += some.w;
  }
  return total;
}

// Times the scales of their outputs, if there are any.
__device__ __forceinline__ float4 scaled(float4 sums, const float* scales, int output) {
  if (scales == nullptr) return sums;
  const float4 by = *reinterpret_cast<const float4*>(scales + output);
  return make_float4(sums.x * by.x, sums.y * by.y, sums.z * by.z, sums.w * by.w);
}

// silu(gate) * up, of both as they are rounded.
__device__ __forceinline__ float gated(float gate, float up) {
  const float wide = widened(gate);
  return wide / (1 + __expf(-wide)) * widened(up);
}

template <typename Number>
__device__ __forceinline__ unsigned loaded(const unsigned char* from) {
  return *reinterpret_cast<const Number*>(from);
}

__device__ __forceinline__ unsigned fused(unsigned a, unsigned b, unsigned c) {
  unsigned sum;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
  return sum;
}

// Two weights of a part of two words, times scale and plus offset. 128 + code has the code in its
// last bits, and 136 less is exact.
__device__ __forceinline__ unsigned of_codes(unsigned words, int part, uint2 by) {
  unsigned codes;
  asm("lop3.b32 %0, %1, 0x000f000f, %2, 0xea;"
      : "=r"(codes) : "r"(words >> 4 * part), "r"(0x43004300));
  return fused(fused(codes, 0x3f803f80, 0xc308c308), by.x, by.y);
}

// Two numbers in float8 that lie next to each other: their bits, a power of two too small.
__device__ __forceinline__ unsigned of_float8(unsigned two) {
  const unsigned apart = __byte_perm(two, 0, 0x1404);
  const unsigned bits = (apart & 0x7f007f00) >> 4 | (apart & 0x80008000);
  return fused(bits, 0x7b807b80, 0x80008000);  // 2^120, and -0, which leaves zeros their sign
}

// Of four bits `pairs` are read, of eight `scales`. If it gates, the outputs are gates and as many
// ups, and what is written is silu(gate) * up.
extern "C" __global__ void __launch_bounds__(kThreads, 1) decode_product(
    const __grid_constant__ Map kernel, const __grid_constant__ Map pairs,
    const __grid_constant__ Map x, const float* __restrict__ scales, void* __restrict__ out,
    int num_rows, int inputs, int outputs, int group_inputs, int is_wide, int is_gated) {
  extern __shared__ __align__(1024) unsigned char memory[];
  __shared__ unsigned long long barriers[2 * STAGES];
  int part, parts;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(part));
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(parts));
  const int group = threadIdx.x / 128, thread = threadIdx.x % 128;
  const int block = blockIdx.x / parts, width = is_gated ? outputs / 2 : outputs;
  const int own = is_gated ? kOutputs / 2 : kOutputs, first = block * own;
  const int steps = (inputs + kInputs - 1) / kInputs;
  const int begin = steps * part / parts, end = steps * (part + 1) / parts;
  const unsigned ring = address(memory), full = address(barriers), empty = full + 8 * STAGES;
  // Of four bits: groups of a step, or steps of a group.
  const int of_step = BITS == 4 && group_inputs < kInputs ? kInputs / group_inputs : 1;
  const int of_group = BITS == 4 && group_inputs > kInputs ? group_inputs / kInputs : 1;

  if (threadIdx.x == kThreads - 1) {
    prepare(kernel), prepare(x);
    if (BITS == 4) prepare(pairs);
  }
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) {
      begin_barrier(full + 8 * s, 1);
      begin_barrier(empty + 8 * s, GROUPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async;" ::: "memory");
  }
  __syncthreads();

  float* const sums = reinterpret_cast<float*>(memory);  // [ROWS][kPitch], when the ring is done
  if (group == GROUPS) {
    if (thread == 0) {
      unsigned long long once, again;
      asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
      asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(again));
      const int lines[] = {first, is_gated ? width + first : first + kOutputs / 2};
      const int bytes = kStage - kPairs + of_step * kOutputs * (BITS == 4 ? 4 : 0);
      int stage = 0, parity = 1;  // the ring is empty to begin with
      for (int step = begin; step < end; ++step) {
        const unsigned to = ring + stage * kStage, barrier = full + 8 * stage;
        wait(empty + 8 * stage, parity);
        expect(barrier, bytes);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (BITS == 4) {
            copy(to + half * kHalf, kernel, 0, step * outputs + lines[half], barrier, once);
            copy(to + 2 * kHalf + half * (kPairs / 2), pairs, lines[half],
                 step / of_group * of_step, barrier, once);
          } else {
            copy(to + half * kHalf, kernel, step * kInputs, lines[half], barrier, once);
          }
        }
#pragma unroll
        for (int line = 0; line < kInputs / 64; ++line)
          copy(to + 2 * kHalf + kPairs + line * kLine, x, step * kInputs + line * 64, 0, barrier,
               again);
        if (++stage == STAGES) stage = 0, parity ^= 1;
      }
    }
  } else {
    float total[ROWS / 2];
#pragma unroll
    for (int i = 0; i < ROWS / 2; ++i) total[i] = 0;
    const int output = 64 * group + thread / 32 * 16 + thread % 32 / 4, t = thread % 4;
    int stage = 0, parity = 0;
#if BITS < 16
    unsigned left[2][4][4];
#endif
    for (int step = begin; step < end; ++step) {
      const unsigned at = ring + stage * kStage, before = stage == 0 ? STAGES - 1 : stage - 1;
      wait(full + 8 * stage, parity);
#if BITS == 16
      const unsigned long long left = side(at + group * 64 * 128), right = side(at + 2 * kHalf);
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int k = 0; k < 4; ++k) multiply(total, left + 2 * k, right + 2 * k);
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");  // for the step before
      if (step > begin && thread == 0) arrive(empty + 8 * before);
#else
      const unsigned char* const here = memory + stage * kStage;
#if BITS == 4
      // Lines of 64 bytes; 16 bytes lie where two bits of the line's number have them.
      unsigned words[2][4];
      const unsigned char* const line = here + output * 64 + 4 * t;
      const int turn = output >> 1 & 3;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        words[0][i] = loaded<unsigned>(line + ((i ^ turn) << 4));
        words[1][i] = loaded<unsigned>(line + 8 * 64 + ((i ^ turn) << 4));
      }
      constexpr int kLinePairs = kOutputs / 2;
      const unsigned char* const pairs_at = here + 2 * kHalf +
                                            output / kLinePairs * (kPairs / 2) +
                                            output % kLinePairs * 4;
#else
      const unsigned char* const line = here + output * 128 + 2 * t;
      const int turn = output & 7;
#endif
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          unsigned(&some)[4] = left[half][k];
#if BITS == 4
          const int of = 2 * half + k / 2, word = k % 2 * 2;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const unsigned pair = loaded<unsigned>(pairs_at + of * of_step / 4 * kLinePairs * 4 +
                                                   8 * 4 * i);
            const uint2 by = {__byte_perm(pair, pair, 0x1010), __byte_perm(pair, pair, 0x3232)};
            some[i] = of_codes(words[i][word], of, by);
            some[i + 2] = of_codes(words[i][word + 1], of, by);
          }
#else
          const unsigned char* const two = line + ((4 * half + k ^ turn) << 4);
#pragma unroll
          for (int i = 0; i < 4; ++i)
            some[i] = of_float8(loaded<unsigned short>(two + i % 2 * 8 * 128 + i / 2 * 8));
#endif
        }
        const unsigned long long right = side(at + 2 * kHalf + kPairs + half * kLine);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int k = 0; k < 4; ++k) multiply(total, left[half][k], right + 2 * k);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        // The other half's registers are given back, and with the second of a step its place.
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        if (half == 0 && step > begin && thread == 0) arrive(empty + 8 * before);
      }
#endif
      if (++stage == STAGES) stage = 0, parity ^= 1;
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    asm volatile("bar.sync 1, %0;" ::"n"(128 * GROUPS) : "memory");
#pragma unroll
    for (int j = 0; j < ROWS / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums[(8 * j + 2 * t + (i & 1)) * kPitch + output + (i >> 1) * 8] = total[4 * j + i];
  }

  wait_for_cluster(parts);
  const int first_row = num_rows * part / parts, last_row = num_rows * (part + 1) / parts;
  const int quads = own / 4;
  for (int i = threadIdx.x; i < (last_row - first_row) * quads; i += kThreads) {
    const int row = first_row + i / quads, column = i % quads * 4, to = first + column;
    if (to >= width) continue;
    const float* const mine = sums + row * kPitch + column;
    float4 total = scaled(added(mine, parts), scales, to);
    if (is_gated) {
      const float4 up = scaled(added(mine + own, parts), scales, width + to);
      total = make_float4(gated(total.x, up.x), gated(total.y, up.y), gated(total.z, up.z),
                          gated(total.w, up.w));
    }
    const long long place = static_cast<long long>(row) * width + to;
    if (is_wide)
      *reinterpret_cast<float4*>(static_cast<float*>(out) + place) = total;
    else
      *reinterpret_cast<uint2*>(static_cast<unsigned short*>(out) + place) =
          make_uint2(rounded(total.x, total.y), rounded(total.z, total.w));
  }
  wait_for_cluster(parts);  // nobody's memory goes while others read it
}
