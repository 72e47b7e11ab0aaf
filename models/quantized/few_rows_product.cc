// Starts the product of few rows with a kernel in four bits (`few_rows_product.cu`): how its
// threads are cut, by what a device has, and the kernels that are compiled and loaded so far.

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda.h"
#include "native.h"

namespace ffi = xla::ffi;

namespace {

constexpr int kRows[] = {1, 8};  // that a kernel is compiled for, as steps have them
constexpr int kForms[] = {1, 2, 3, 4, 6, 8, 12};  // tiles of 16 outputs that a block has
constexpr int kMostStages = 3;  // with more, the first of a block come later

struct Kernel {
  void* function;
  int outputs, threads, bytes;
};

struct Card {
  int processors, shared_bytes, capability;
};

// What a kernel is compiled for, beside a card.
struct Size {
  int rows, form;
  bool is_gated;

  bool operator<(const Size& other) const {
    return std::tie(rows, form, is_gated) < std::tie(other.rows, other.form, other.is_gated);
  }
};

std::mutex mutex;
std::string compiler, source;                                // where NVRTC lies; the text
std::map<std::pair<int, Size>, std::vector<char>> binaries;  // by capability
std::map<std::pair<int, Size>, Kernel> kernels;              // by device
std::map<int, Card> cards;                                   // by device

const Card& card_of(int device) {
  const auto found = cards.find(device);
  if (found != cards.end()) return found->second;
  int major = 0, minor = 0;
  Card one = {};
  const auto ask = [&](int* value, int which) {
    cuda::check(cuda::driver().attribute(value, which, device), "cuDeviceGetAttribute");
  };
  ask(&one.processors, 16), ask(&one.shared_bytes, 97), ask(&major, 75), ask(&minor, 76);
  one.capability = 10 * major + minor;
  return cards[device] = one;
}

// How the threads of a block are cut. If it gates, groups of warps are even in number.
struct Cut {
  int tiles, groups, shares, stages, bytes;

  Cut(const Size& size, int shared_bytes) {
    tiles = size.form <= 3 ? size.form : 2, groups = size.form / tiles;
    if (size.is_gated && groups % 2 == 1) tiles = size.form / 2, groups = 2;
    shares = groups == 1 ? 8 : 12 / groups;
    const int stage = groups * shares * (1280 * tiles + 256 * size.rows);
    stages = std::min(kMostStages, shared_bytes / stage);
    bytes = std::max(stages * stage, shares * size.rows * size.form * 16 * 4);
  }
};

// That of the form with which the processors, a block each at a time, are done first; a block takes
// as long as another tile to begin and to end. One that gates has as many tiles of gates as of ups.
Size size_for(const Card& card, int rows, int outputs, bool is_gated) {
  Size best = {};
  int least = 0;
  for (int form : kForms) {
    const Size size = {rows, form, is_gated};
    if (16 * form > outputs || (is_gated && form % 2 == 1)) continue;
    if (Cut(size, card.shared_bytes).stages < 2) continue;
    const int blocks = (outputs + 16 * form - 1) / (16 * form);
    const int time = (blocks + card.processors - 1) / card.processors * (form + 1);
    if (best.form == 0 || time <= least) best = size, least = time;
  }
  if (best.form == 0) throw std::string("the device has too little shared memory");
  return best;
}

const std::vector<char>& compiled(int device, const Size& size) {
  const Card& card = card_of(device);
  std::vector<char>& binary = binaries[{card.capability, size}];
  if (binary.empty()) {
    const Cut cut(size, card.shared_bytes);
    binary = cuda::compiled(compiler.c_str(), source.c_str(), "few_rows_product.cu", device,
                            {
                                "-DTILES=" + std::to_string(cut.tiles),
                                "-DGROUPS_OF_WARPS=" + std::to_string(cut.groups),
                                "-DSHARES=" + std::to_string(cut.shares),
                                "-DSTAGES=" + std::to_string(cut.stages),
                                "-DROWS=" + std::to_string(size.rows),
                                "-DIS_GATED=" + std::to_string(size.is_gated),
                            });
  }
  return binary;
}

// The kernel for so many rows and outputs, in the context of its device. The call that needs it
// first may be one that is recorded into a graph, in which threads may not load by default.
const Kernel& kernel_for(int device, int num_rows, int outputs, bool is_gated) {
  const Card& card = card_of(device);
  int rows = 0;
  for (int one : kRows)
    if (rows < num_rows) rows = one;
  if (rows < num_rows) throw std::string("there are too many rows");
  const Size size = size_for(card, rows, outputs, is_gated);
  const auto found = kernels.find({device, size});
  if (found != kernels.end()) return found->second;
  const std::vector<char>& binary = compiled(device, size);
  const cuda::Context context(device);
  const cuda::WhileRecording relaxed;
  const Cut cut(size, card.shared_bytes);
  void* const function = cuda::kernel(binary, "few_rows_product");
  cuda::check(cuda::driver().set_attribute(function, 8, cut.bytes), "cuFuncSetAttribute");
  const Kernel kernel = {function, 16 * size.form, 32 * cut.groups * cut.shares, cut.bytes};
  return kernels[{device, size}] = kernel;
}

ffi::Error few_rows_product(int32_t device, void* stream, ffi::AnyBuffer x, ffi::AnyBuffer words,
                            ffi::AnyBuffer pairs, ffi::Result<ffi::AnyBuffer> out,
                            bool is_gated) {
  const std::lock_guard<std::mutex> lock(mutex);
  int num_rows = x.dimensions()[0], blocks = words.dimensions()[0];
  int outputs = words.dimensions()[1], groups = pairs.dimensions()[0];
  int is_wide = out->element_type() == ffi::DataType::F32;
  const void *x_from = x.untyped_data(), *words_from = words.untyped_data();
  const void* pairs_from = pairs.untyped_data();
  void* to = out->untyped_data();
  try {
    const Kernel& kernel = kernel_for(device, num_rows, outputs, is_gated);
    void* arguments[] = {&x_from, &words_from, &pairs_from, &to,     &num_rows,
                         &blocks, &outputs,    &groups,     &is_wide};
    const int grid = (outputs + kernel.outputs - 1) / kernel.outputs;
    cuda::check(cuda::driver().launch(kernel.function, grid, 1, 1, kernel.threads, 1, 1,
                                      kernel.bytes, stream, arguments, nullptr),
                "cuLaunchKernel");
    return ffi::Error::Success();
  } catch (const std::string& problem) {
    return ffi::Error::Internal("few_rows_product: " + problem);
  }
}

}  // namespace

// Sees whether kernels can be compiled for the first device. Returns 0, or 1 and why not.
extern "C" int open_product(const char* nvrtc, const char* text, char* why, size_t size) {
  const std::lock_guard<std::mutex> lock(mutex);
  return cuda::told(why, size, [&] {
    compiler = nvrtc, source = text;
    compiled(0, size_for(card_of(0), kRows[0], 4096, false));
  });
}

extern "C" int most_rows() { return *std::max_element(std::begin(kRows), std::end(kRows)); }

XLA_FFI_DEFINE_HANDLER_SYMBOL(FewRowsProduct, few_rows_product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Ctx<ffi::PlatformStream<void*>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<bool>("is_gated"),
                              {ffi::Traits::kCmdBufferCompatible});
