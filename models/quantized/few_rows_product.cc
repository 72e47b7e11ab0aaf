// Starts the product of few rows with a kernel in four bits (`few_rows_product.cu`): how its
// threads are cut, by what a device has, and the kernels that are compiled and loaded so far.

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
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

std::mutex mutex;
std::string compiler, source;                                     // where NVRTC lies; the text
std::map<std::tuple<int, int, int>, std::vector<char>> binaries;  // by capability, rows, form
std::map<std::tuple<int, int, int>, Kernel> kernels;              // by device, rows, form
std::map<int, Card> cards;                                        // by device

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

// How the threads of a block are cut, for a form.
struct Cut {
  int tiles, groups, shares, stages, bytes;

  Cut(int form, int rows, int shared_bytes) {
    tiles = form <= 3 ? form : 2, groups = form / tiles, shares = groups == 1 ? 8 : 12 / groups;
    const int stage = groups * shares * (1280 * tiles + 256 * rows);
    stages = std::min(kMostStages, shared_bytes / stage);
    bytes = std::max(stages * stage, shares * rows * form * 16 * 4);
  }
};

// The form with which the processors, a block each at a time, are done first; a block takes as long
// as another tile to begin and to end.
int form_for(const Card& card, int rows, int outputs) {
  int best = 0, least = 0;
  for (int form : kForms) {
    if (16 * form > outputs || Cut(form, rows, card.shared_bytes).stages < 2) continue;
    const int blocks = (outputs + 16 * form - 1) / (16 * form);
    const int time = (blocks + card.processors - 1) / card.processors * (form + 1);
    if (best == 0 || time <= least) best = form, least = time;
  }
  if (best == 0) throw std::string("the device has too little shared memory");
  return best;
}

const std::vector<char>& compiled(int device, int rows, int form) {
  const Card& card = card_of(device);
  std::vector<char>& binary = binaries[{card.capability, rows, form}];
  if (binary.empty()) {
    const Cut cut(form, rows, card.shared_bytes);
    binary = cuda::compiled(compiler.c_str(), source.c_str(), "few_rows_product.cu", device,
                            {
                                "-DTILES=" + std::to_string(cut.tiles),
                                "-DGROUPS_OF_WARPS=" + std::to_string(cut.groups),
                                "-DSHARES=" + std::to_string(cut.shares),
                                "-DSTAGES=" + std::to_string(cut.stages),
                                "-DROWS=" + std::to_string(rows),
                            });
  }
  return binary;
}

// The kernel for so many rows and outputs, in the context of its device. The call that needs it
// first may be one that is recorded into a graph, in which threads may not load by default.
const Kernel& kernel_for(int device, int num_rows, int outputs) {
  const Card& card = card_of(device);
  int rows = 0;
  for (int one : kRows)
    if (rows < num_rows) rows = one;
  if (rows < num_rows) throw std::string("there are too many rows");
  const int form = form_for(card, rows, outputs);
  const auto found = kernels.find({device, rows, form});
  if (found != kernels.end()) return found->second;
  const std::vector<char>& binary = compiled(device, rows, form);
  const cuda::Context context(device);
  const cuda::WhileRecording relaxed;
  const Cut cut(form, rows, card.shared_bytes);
  void* const function = cuda::kernel(binary, "few_rows_product");
  cuda::check(cuda::driver().set_attribute(function, 8, cut.bytes), "cuFuncSetAttribute");
  const Kernel kernel = {function, 16 * form, 32 * cut.groups * cut.shares, cut.bytes};
  return kernels[{device, rows, form}] = kernel;
}

ffi::Error few_rows_product(int32_t device, void* stream, ffi::AnyBuffer x, ffi::AnyBuffer words,
                            ffi::AnyBuffer pairs, ffi::Result<ffi::AnyBuffer> out) {
  const std::lock_guard<std::mutex> lock(mutex);
  int num_rows = x.dimensions()[0], blocks = words.dimensions()[0];
  int outputs = words.dimensions()[1], groups = pairs.dimensions()[0];
  int is_wide = out->element_type() == ffi::DataType::F32;
  const void *x_from = x.untyped_data(), *words_from = words.untyped_data();
  const void* pairs_from = pairs.untyped_data();
  void* to = out->untyped_data();
  try {
    const Kernel& kernel = kernel_for(device, num_rows, outputs);
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
    compiled(0, kRows[0], form_for(card_of(0), kRows[0], 4096));
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
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});
