// The sum over the GPUs of one machine of what each has computed, as one kernel on each of them.
//
// Every device has a memory that the others can read: flags, a count of the calls, and two halves
// for numbers. A call puts the device's numbers into the half that is its turn, tells the others,
// waits until they have, and adds up what all of them have put there, in one order everywhere. It
// may fill the same half again two calls later: whoever has begun the call between has read it.

#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "cuda.h"
#include "native.h"

namespace ffi = xla::ffi;

namespace {

const char* const kSource = R"cuda(
struct Memories { unsigned char* of[MOST_DEVICES]; };

__device__ void tell(unsigned* flag, unsigned call) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(call) : "memory");
}

__device__ unsigned told(const unsigned* flag) {
  unsigned call;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(call) : "l"(flag) : "memory");
  return call;
}

__device__ uint4 read(const uint4* place) {  // past the cache, which does not know of the others
  uint4 found;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(found.x), "=r"(found.y), "=r"(found.z), "=r"(found.w) : "l"(place));
  return found;
}

__device__ float lower(unsigned pair) { return __uint_as_float(pair << 16); }
__device__ float upper(unsigned pair) { return __uint_as_float(pair & 0xffff0000u); }

__device__ unsigned rounded(float low, float high) {
  unsigned pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// `num` times eight numbers of bfloat16. Each block has flags and a count of its own.
extern "C" __global__ void __launch_bounds__(THREADS)
    peer_sum(const uint4* x, uint4* out, Memories memories, int rank, int count, int num) {
  unsigned char* const own = memories.of[rank];
  unsigned* const calls = reinterpret_cast<unsigned*>(own + CALLS_AT) + blockIdx.x;
  const unsigned call = *calls + 1;
  const long long half = NUMBERS_AT + (call & 1) * (long long)HALF_BYTES;
  const int first = blockIdx.x * THREADS + threadIdx.x, stride = gridDim.x * THREADS;
  for (int i = first; i < num; i += stride) reinterpret_cast<uint4*>(own + half)[i] = x[i];
  __syncthreads();
  if (threadIdx.x < count) {
    const int block = blockIdx.x * MOST_DEVICES;
    tell(reinterpret_cast<unsigned*>(memories.of[threadIdx.x]) + block + rank, call);
    const unsigned* flag = reinterpret_cast<const unsigned*>(own) + block + threadIdx.x;
    unsigned long long start, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
    while (static_cast<int>(told(flag) - call) < 0) {
      asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
      if (now - start > MOST_NANOSECONDS) __trap();
    }
  }
  __syncthreads();
  for (int i = first; i < num; i += stride) {
    float sums[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    for (int other = 0; other < count; ++other) {
      const uint4 one = read(reinterpret_cast<const uint4*>(memories.of[other] + half) + i);
      const unsigned pairs[4] = {one.x, one.y, one.z, one.w};
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        sums[2 * pair] += lower(pairs[pair]);
        sums[2 * pair + 1] += upper(pairs[pair]);
      }
    }
    out[i] = make_uint4(rounded(sums[0], sums[1]), rounded(sums[2], sums[3]),
                        rounded(sums[4], sums[5]), rounded(sums[6], sums[7]));
  }
  if (threadIdx.x == 0) *calls = call;
}
)cuda";

constexpr int kMostDevices = 8, kThreads = 512;
constexpr int kBlocks = 64;  // no more than run at once: each waits for its like
constexpr int64_t kHalfBytes = 4 << 20;
constexpr int64_t kCallsAt = kBlocks * kMostDevices * 4, kNumbersAt = 16384;
constexpr int64_t kBytes = kNumbersAt + 2 * kHalfBytes;
static_assert(kCallsAt + kBlocks * 4 <= kNumbersAt);

struct Memories {
  uint64_t of[kMostDevices];
};

struct Group {
  Memories memories = {};
  std::map<int, void*> functions;  // by device
};

std::mutex mutex;
std::map<uint32_t, Group> groups;  // by the devices, a bit each

std::vector<char> compiled(const char* nvrtc, int device) {
  return cuda::compiled(nvrtc, kSource, "peer_sum.cu", device,
                        {
                            "-DMOST_DEVICES=" + std::to_string(kMostDevices),
                            "-DTHREADS=" + std::to_string(kThreads),
                            "-DCALLS_AT=" + std::to_string(kCallsAt),
                            "-DNUMBERS_AT=" + std::to_string(kNumbersAt),
                            "-DHALF_BYTES=" + std::to_string(kHalfBytes),
                            "-DMOST_NANOSECONDS=60000000000ull",
                        });
}

void open_group(uint32_t devices, const char* nvrtc) {
  const cuda::Driver& driver = cuda::driver();
  std::vector<int> members;
  for (int device = 0; device < 32; ++device)
    if (devices >> device & 1) members.push_back(device);
  if (members.size() > kMostDevices) throw std::string("they are more than 8");
  for (int one : members)
    for (int other : members) {
      int can = one == other;
      if (!can) cuda::check(driver.can_access(&can, one, other), "cuDeviceCanAccessPeer");
      if (!can) throw std::string("they cannot read each other's memory");
    }
  const std::vector<char> binary = compiled(nvrtc, members[0]);
  std::map<int, void*> contexts;
  for (int one : members)
    cuda::check(driver.retain(&contexts[one], one), "cuDevicePrimaryCtxRetain");
  Group group;
  for (size_t rank = 0; rank < members.size(); ++rank) {
    const cuda::Context context(members[rank]);
    for (int other : members) {
      if (other == members[rank]) continue;
      const int status = driver.enable_access(contexts[other], 0);
      if (status != 704) cuda::check(status, "cuCtxEnablePeerAccess");  // 704: enabled already
    }
    cuda::check(driver.allocate(&group.memories.of[rank], kBytes), "cuMemAlloc");
    cuda::check(driver.fill(group.memories.of[rank], 0, kBytes), "cuMemset");
    group.functions[members[rank]] = cuda::kernel(binary, "peer_sum");
    cuda::check(driver.synchronize(), "cuCtxSynchronize");
  }
  groups[devices] = group;
}

ffi::Error peer_sum(int32_t device, void* stream, ffi::AnyBuffer x, uint32_t devices,
                    ffi::Result<ffi::AnyBuffer> out) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto group = groups.find(devices);
  if (group == groups.end() || group->second.functions.count(device) == 0)
    return ffi::Error::InvalidArgument("peer_sum: the group of devices is not open");
  int rank = __builtin_popcount(devices & ((1u << device) - 1)), count = __builtin_popcount(devices);
  int num = x.size_bytes() / 16;
  const void* from = x.untyped_data();
  void* to = out->untyped_data();
  void* arguments[] = {&from, &to, &group->second.memories, &rank, &count, &num};
  const int status = cuda::driver().launch(group->second.functions[device], kBlocks, 1, 1, kThreads,
                                           1, 1, 0, stream, arguments, nullptr);
  if (status == 0) return ffi::Error::Success();
  return ffi::Error::Internal("peer_sum: the launch failed with status " + std::to_string(status));
}

}  // namespace

// Makes the memory of a group of devices, a bit each, and its kernel. Returns 0, or 1 and why not.
extern "C" int open_peers(uint32_t devices, const char* nvrtc, char* why, size_t size) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (groups.count(devices) > 0) return 0;
  return cuda::told(why, size, [&] { open_group(devices, nvrtc); });
}

extern "C" int64_t most_bytes() { return kHalfBytes; }

XLA_FFI_DEFINE_HANDLER_SYMBOL(PeerSum, peer_sum,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Ctx<ffi::PlatformStream<void*>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Attr<uint32_t>("devices")
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});
