// The product of the rows of a decode step with a kernel in half precision, on GPUs of the Hopper
// generation: at the speed of the kernel's bytes, or of the tensor cores.
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
// One thread asks the copy engine for 64 inputs at a time, which land in a ring in shared memory;
// the groups multiply them.
//
// It is compiled by NVRTC with ROWS (a multiple of 8, at most 256), GROUPS that multiply, STAGES
// of the ring, IS_BFLOAT16 (else float16), and `multiply`, whose text depends on ROWS.

#if IS_BFLOAT16
#define TYPE "bf16"
#else
#define TYPE "f16"
#endif

constexpr int kOutputs = 64 * GROUPS, kInputs = 64, kThreads = 128 * (GROUPS + 1);
constexpr int kHalf = kOutputs * kInputs, kLeft = 2 * kHalf;  // bytes of a stage
constexpr int kStage = kLeft + ROWS * kInputs * 2;
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

// Has a box of lines of 64 inputs copied; what lies outside the array comes as zeros.
__device__ __forceinline__ void copy(unsigned to, const Map& map, int input, int line,
                                     unsigned barrier, unsigned long long policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;"
      ::"r"(to), "l"(&map), "r"(input), "r"(line), "r"(barrier), "l"(policy) : "memory");
}

// A side of a product in shared memory: lines of 128 bytes, of which eight are swizzled together.
__device__ __forceinline__ unsigned long long side(unsigned at) {
  return 1ull << 62 | 64ull << 32 | 1ull << 16 | (at & 0x3ffff) >> 4;
}

// Waits for all blocks of the cluster.
__device__ __forceinline__ void wait_for_cluster() {
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

// silu(gate) * up, of both as they are rounded.
__device__ __forceinline__ float gated(float gate, float up) {
  const float wide = widened(gate);
  return wide / (1 + __expf(-wide)) * widened(up);
}

// If it gates, the outputs are gates and as many ups, and what is written is silu(gate) * up.
extern "C" __global__ void __launch_bounds__(kThreads, 1) decode_product(
    const __grid_constant__ Map kernel, const __grid_constant__ Map x, void* __restrict__ out,
    int num_rows, int inputs, int outputs, int is_wide, int is_gated) {
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
      const int second = is_gated ? width + first : first + kOutputs / 2;
      int stage = 0, parity = 1;  // the ring is empty to begin with
      for (int step = begin; step < end; ++step) {
        const unsigned to = ring + stage * kStage, barrier = full + 8 * stage;
        wait(empty + 8 * stage, parity);
        expect(barrier, kStage);
        copy(to, kernel, step * kInputs, first, barrier, once);
        copy(to + kHalf, kernel, step * kInputs, second, barrier, once);
        copy(to + kLeft, x, step * kInputs, 0, barrier, again);
        if (++stage == STAGES) stage = 0, parity ^= 1;
      }
    }
  } else {
    float total[ROWS / 2];
#pragma unroll
    for (int i = 0; i < ROWS / 2; ++i) total[i] = 0;
    int stage = 0, parity = 0;
    for (int step = begin; step < end; ++step) {
      const unsigned at = ring + stage * kStage;
      wait(full + 8 * stage, parity);
      const unsigned long long left = side(at + group * 64 * kInputs * 2);
      const unsigned long long right = side(at + kLeft);
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int k = 0; k < kInputs / 16; ++k) multiply(total, left + 2 * k, right + 2 * k);
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");  // for the step before
      if (step > begin && thread == 0) arrive(empty + 8 * (stage == 0 ? STAGES - 1 : stage - 1));
      if (++stage == STAGES) stage = 0, parity ^= 1;
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    asm volatile("bar.sync 1, %0;" ::"n"(128 * GROUPS) : "memory");
    const int output = 64 * group + thread / 32 * 16 + thread % 32 / 4, row = thread % 4 * 2;
#pragma unroll
    for (int j = 0; j < ROWS / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums[(8 * j + row + (i & 1)) * kPitch + output + (i >> 1) * 8] = total[4 * j + i];
  }

  wait_for_cluster();
  const int first_row = num_rows * part / parts, last_row = num_rows * (part + 1) / parts;
  const int quads = own / 4;
  for (int i = threadIdx.x; i < (last_row - first_row) * quads; i += kThreads) {
    const int row = first_row + i / quads, output = i % quads * 4;
    if (first + output >= width) continue;
    const float* const mine = sums + row * kPitch + output;
    float4 total = added(mine, parts);
    if (is_gated) {
      const float4 up = added(mine + own, parts);
      total = make_float4(gated(total.x, up.x), gated(total.y, up.y), gated(total.z, up.z),
                          gated(total.w, up.w));
    }
    const long long place = static_cast<long long>(row) * width + first + output;
    if (is_wide)
      *reinterpret_cast<float4*>(static_cast<float*>(out) + place) = total;
    else
      *reinterpret_cast<uint2*>(static_cast<unsigned short*>(out) + place) =
          make_uint2(rounded(total.x, total.y), rounded(total.z, total.w));
  }
  wait_for_cluster();  // nobody's memory goes while others read it
}
