// What the host and a program that is running tell each other, through memory that both can read.
//
// A box belongs to an engine. For each turn, a number that only rises, the program waits until the
// host has put masks there, and tells it the tokens that it has sampled with them:
//
//     host     masks, then their turn ──>  program    tokens, then their turn ──> host
//
// Of a GPU the memory is pinned, and the kernels below are part of the program's CUDA graph.

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <climits>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "cuda.h"
#include "native.h"

namespace ffi = xla::ffi;

namespace {

// A box begins with this; tokens and masks lie behind, at multiples of `kAlignment` bytes.
struct Head {
  alignas(64) uint32_t masks_turn;   // of the masks that are there
  alignas(64) uint32_t tokens_turn;  // of the tokens that are there
  alignas(64) uint64_t tokens_at;    // bytes from the beginning of the box
  uint64_t masks_at;
  bool is_of_gpu;
};

constexpr uint64_t kAlignment = 256;
static_assert(sizeof(Head) <= kAlignment);
constexpr int64_t kMostSeconds = 60;  // that a program waits: then no token is allowed

// `mail` has a line for each row, all alike: the turn, and where the box is, in two halves.
const char* const kSource = R"cuda(
struct Head {
  alignas(64) unsigned masks_turn;
  alignas(64) unsigned tokens_turn;
  alignas(64) unsigned long long tokens_at;
  unsigned long long masks_at;
};

__device__ unsigned char* box_of(const unsigned* mail) {
  return reinterpret_cast<unsigned char*>(mail[1] | (unsigned long long)mail[2] << 32);
}

// `num` words of four bytes.
extern "C" __global__ void receive_masks(const unsigned* mail, unsigned* out, long long num) {
  unsigned char* const box = box_of(mail);
  __shared__ bool are_there;
  if (threadIdx.x == 0) {
    are_there = false;
    if (box != nullptr) {
      const unsigned turn = mail[0];
      const unsigned* flag = &reinterpret_cast<const Head*>(box)->masks_turn;
      unsigned long long start, now;
      asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
      do {
        unsigned found;
        asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(found) : "l"(flag) : "memory");
        are_there = static_cast<int>(found - turn) >= 0;
        if (are_there) break;
        asm volatile("nanosleep.u32 200;");
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
      } while (now - start < MOST_NANOSECONDS);
    }
  }
  __syncthreads();
  const long long first = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  const long long stride = gridDim.x * (long long)blockDim.x;
  if (!are_there) {  // without a box everything is allowed
    for (long long i = first; i < num; i += stride) out[i] = box == nullptr ? 0xffffffffu : 0;
    return;
  }
  const unsigned char* const masks = box + reinterpret_cast<const Head*>(box)->masks_at;
  for (long long i = first; i < num / 4; i += stride) {
    uint4 found;  // past the cache, which may have the masks before
    asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(found.x), "=r"(found.y), "=r"(found.z), "=r"(found.w)
                 : "l"(reinterpret_cast<const uint4*>(masks) + i));
    reinterpret_cast<uint4*>(out)[i] = found;
  }
  for (long long i = num / 4 * 4 + first; i < num; i += stride)
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];"
                 : "=r"(out[i])
                 : "l"(reinterpret_cast<const unsigned*>(masks) + i));
}

extern "C" __global__ void send_tokens(const unsigned* mail, const int* tokens,
                                       const unsigned char* is_valid, int* out, long long num) {
  unsigned char* const box = box_of(mail);
  int* told = nullptr;
  if (box != nullptr)
    told = reinterpret_cast<int*>(box + reinterpret_cast<const Head*>(box)->tokens_at);
  for (long long i = threadIdx.x; i < num; i += blockDim.x) {
    out[i] = tokens[i];
    if (told != nullptr) told[i] = is_valid[i] ? tokens[i] : -1;
  }
  __threadfence_system();
  __syncthreads();
  if (threadIdx.x == 0 && box != nullptr)
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(
                     &reinterpret_cast<Head*>(box)->tokens_turn),
                 "r"(mail[0])
                 : "memory");
}
)cuda";

constexpr int kThreads = 256, kBlocks = 64;

struct Kernels {
  void *receive = nullptr, *send = nullptr;
};

std::mutex mutex;
std::map<int, Kernels> kernels;  // by device

bool is_there(const uint32_t* flag, uint32_t turn) {
  return static_cast<int32_t>(__atomic_load_n(flag, __ATOMIC_ACQUIRE) - turn) >= 0;
}

// Waits for a turn; false if it takes longer than so many seconds. Of what a GPU tells the system
// does not know: who waits for that has to look now and then.
bool await(uint32_t* flag, uint32_t turn, double most_seconds, bool is_of_gpu) {
  const auto start = std::chrono::steady_clock::now();
  while (!is_there(flag, turn)) {
    const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start;
    const double left = most_seconds - spent.count();
    if (left <= 0) return false;
    if (is_of_gpu) {
      usleep(20);
      continue;
    }
    const uint32_t found = __atomic_load_n(flag, __ATOMIC_ACQUIRE);
    if (static_cast<int32_t>(found - turn) >= 0) return true;
    timespec limit;
    limit.tv_sec = static_cast<time_t>(left);
    limit.tv_nsec = static_cast<long>((left - limit.tv_sec) * 1e9);
    syscall(SYS_futex, flag, FUTEX_WAIT_PRIVATE, found, &limit, nullptr, 0);
  }
  return true;
}

// Says that a turn is there, unless a later one has been said.
void say(uint32_t* flag, uint32_t turn) {
  uint32_t before = __atomic_load_n(flag, __ATOMIC_RELAXED);
  while (static_cast<int32_t>(turn - before) > 0 &&
         !__atomic_compare_exchange_n(flag, &before, turn, false, __ATOMIC_RELEASE,
                                      __ATOMIC_RELAXED)) {
  }
  syscall(SYS_futex, flag, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

unsigned char* box_of(const uint32_t* mail) {
  return reinterpret_cast<unsigned char*>(mail[1] | static_cast<uint64_t>(mail[2]) << 32);
}

ffi::Error receive_masks(ffi::AnyBuffer mail, ffi::AnyBuffer, ffi::Result<ffi::AnyBuffer> out) {
  const auto* line = static_cast<const uint32_t*>(mail.untyped_data());
  unsigned char* box = box_of(line);
  if (box == nullptr) {
    std::memset(out->untyped_data(), 0xff, out->size_bytes());
  } else if (await(&reinterpret_cast<Head*>(box)->masks_turn, line[0], kMostSeconds, false)) {
    std::memcpy(out->untyped_data(), box + reinterpret_cast<Head*>(box)->masks_at,
                out->size_bytes());
  } else {
    std::memset(out->untyped_data(), 0, out->size_bytes());
  }
  return ffi::Error::Success();
}

ffi::Error send_tokens(ffi::AnyBuffer mail, ffi::AnyBuffer tokens, ffi::AnyBuffer is_valid,
                       ffi::Result<ffi::AnyBuffer> out) {
  const auto* line = static_cast<const uint32_t*>(mail.untyped_data());
  const auto* given = static_cast<const int32_t*>(tokens.untyped_data());
  const auto* valid = static_cast<const uint8_t*>(is_valid.untyped_data());
  std::memcpy(out->untyped_data(), given, tokens.size_bytes());
  if (unsigned char* box = box_of(line)) {
    Head* head = reinterpret_cast<Head*>(box);
    auto* told = reinterpret_cast<int32_t*>(box + head->tokens_at);
    for (size_t i = 0; i < tokens.element_count(); ++i) told[i] = valid[i] ? given[i] : -1;
    say(&head->tokens_turn, line[0]);
  }
  return ffi::Error::Success();
}

ffi::Error launch(int32_t device, void* stream, void* Kernels::*which, int blocks,
                  void** arguments) {
  void* function = nullptr;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = kernels.find(device);
    if (found == kernels.end())
      return ffi::Error::InvalidArgument("mail: the device is not open");
    function = found->second.*which;
  }
  const int status = cuda::driver().launch(function, blocks, 1, 1, kThreads, 1, 1, 0, stream,
                                           arguments, nullptr);
  if (status == 0) return ffi::Error::Success();
  return ffi::Error::Internal("mail: a launch failed with status " + std::to_string(status));
}

ffi::Error receive_masks_cuda(int32_t device, void* stream, ffi::AnyBuffer mail, ffi::AnyBuffer,
                              ffi::Result<ffi::AnyBuffer> out) {
  const void* line = mail.untyped_data();
  void* to = out->untyped_data();
  long long num = out->element_count();
  void* arguments[] = {&line, &to, &num};
  return launch(device, stream, &Kernels::receive, kBlocks, arguments);
}

ffi::Error send_tokens_cuda(int32_t device, void* stream, ffi::AnyBuffer mail,
                            ffi::AnyBuffer tokens, ffi::AnyBuffer is_valid,
                            ffi::Result<ffi::AnyBuffer> out) {
  const void *line = mail.untyped_data(), *from = tokens.untyped_data();
  const void* valid = is_valid.untyped_data();
  void* to = out->untyped_data();
  long long num = tokens.element_count();
  void* arguments[] = {&line, &from, &valid, &to, &num};
  return launch(device, stream, &Kernels::send, 1, arguments);
}

}  // namespace

// Compiles and loads the kernels of a GPU. Returns 0, or 1 and why not.
extern "C" int open_device(int device, const char* nvrtc, char* why, size_t size) {
  const std::lock_guard<std::mutex> lock(mutex);
  return cuda::told(why, size, [&] {
    if (kernels.count(device) > 0) return;
    const auto limit = "-DMOST_NANOSECONDS=" + std::to_string(kMostSeconds) + "000000000ull";
    const cuda::Context context(device);
    const auto binary = cuda::compiled(nvrtc, kSource, "mail.cu", device, {limit});
    kernels[device] = {cuda::kernel(binary, "receive_masks"), cuda::kernel(binary, "send_tokens")};
  });
}

// Makes a box with room for so many rows, and words of a mask for each; `device` is below 0 if no
// GPU is to read it. Returns 0, or 1 and why not. The box, and where its tokens and its masks are,
// go to `places`. Nobody frees it: a program may read it as long as there are any.
extern "C" int make_box(int64_t rows, int64_t words, int device, uint64_t* places, char* why,
                        size_t size) {
  return cuda::told(why, size, [&] {
    const uint64_t tokens = (rows * 4 + kAlignment - 1) / kAlignment * kAlignment;
    const uint64_t bytes = kAlignment + tokens + rows * words * 4;
    void* box = nullptr;
    if (device >= 0) {
      const cuda::Context context(device);
      // 1: for all devices, 2: which find it at the same address.
      cuda::check(cuda::driver().allocate_host(&box, bytes, 1 | 2), "cuMemHostAlloc");
    } else if (posix_memalign(&box, kAlignment, bytes) != 0) {
      throw std::string("there is no memory");
    }
    std::memset(box, 0, bytes);
    auto* head = static_cast<Head*>(box);
    head->is_of_gpu = device >= 0;
    head->tokens_at = kAlignment;
    head->masks_at = kAlignment + tokens;
    places[0] = reinterpret_cast<uint64_t>(box);
    places[1] = places[0] + head->tokens_at;
    places[2] = places[0] + head->masks_at;
  });
}

// Says that the masks of a turn are there, unless a later turn has been said.
extern "C" void tell_masks(uint64_t box, uint32_t turn) {
  say(&reinterpret_cast<Head*>(box)->masks_turn, turn);
}

// Waits for the tokens of a turn; returns whether they came within so many seconds.
extern "C" int await_tokens(uint64_t box, uint32_t turn, double most_seconds) {
  Head* head = reinterpret_cast<Head*>(box);
  return await(&head->tokens_turn, turn, most_seconds, head->is_of_gpu);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(ReceiveMasks, receive_masks,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(SendTokens, send_tokens,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(ReceiveMasksCuda, receive_masks_cuda,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Ctx<ffi::PlatformStream<void*>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(SendTokensCuda, send_tokens_cuda,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Ctx<ffi::PlatformStream<void*>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});
