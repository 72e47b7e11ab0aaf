// Starts the product of a decode step's rows (`decode_product.cu`), and compiles it for numbers of
// rows, ahead of the programs that call it.

#include <algorithm>
#include <cstdint>
#include <fstream>
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

constexpr int kMostStages = 8;               // of a ring
constexpr int kMostBytes = 220 * 1024;       // of shared memory that a ring takes
constexpr int kFewRows = 8, kStepRows = 32;  // kernels are for so many rows, and for multiples

// What the driver calls types of numbers and ways to lie in shared memory.
enum Type { kBytes = 0, kInt16 = 1, kInt32 = 3, kFloat16 = 6, kBfloat16 = 9 };
enum Swizzle { kPlain = 0, kOf64 = 2, kOf128 = 3 };

// What a kernel is compiled for.
struct Form {
  int bits, rows, groups, is_bfloat16;

  int inputs() const { return bits == 16 ? 64 : 128; }  // of a step
  int stage_bytes() const {
    const int pairs = bits == 4 ? 16 : 0;
    return 64 * groups * (inputs() * bits / 8 + pairs) + inputs() * 2 * rows;
  }
  int stages() const { return std::min(kMostStages, kMostBytes / stage_bytes()); }
  // A ring, or the sums that lie there afterwards.
  int shared_bytes() const {
    return std::max(stages() * stage_bytes(), rows * (64 * groups + 4) * 4);
  }
  std::string name() const {
    return std::to_string(rows) + "x" + std::to_string(64 * groups);
  }
};

struct Kernel {
  void* function;
  int bytes;
};

// What the copy engine is told of an array.
struct alignas(64) Map {
  char bytes[128];
};

// The kernels that a device has loaded, each with a lock of its own: who loads may have to wait for
// what runs there, which may wait for another device.
struct Loaded {
  std::mutex mutex;
  std::map<std::tuple<int, int, std::string>, Kernel> kernels;  // by bits, whether bfloat16, name
};

std::mutex mutex;                                        // of these two
std::map<std::pair<int, int>, std::string> directories;  // by bits, and whether bfloat16
std::map<int, Loaded> devices;

int rounded_up(int rows) {
  return rows <= kFewRows ? kFewRows : (rows + kStepRows - 1) / kStepRows * kStepRows;
}

// The function `multiply` of the source: 64 outputs times so many rows, whose sums are as many
// operands. The left side lies in shared memory, or in four registers.
std::string multiply(const Form& form) {
  const int count = form.rows / 2, of_left = form.bits == 16 ? 1 : 4;
  const auto listed = [](int first, int count, const char* before, const char* after) {
    std::string list;
    for (int i = first; i < first + count; ++i)
      list += (i == first ? "" : ", ") + std::string(before) + std::to_string(i) + after;
    return list;
  };
  const std::string type = form.is_bfloat16 ? "bf16" : "f16";
  const std::string size = std::to_string(count), right = "%" + std::to_string(count + of_left);
  const bool is_shared = form.bits == 16;
  return "__device__ __forceinline__ void multiply(float (&total)[" + size + "], " +
         (is_shared ? "unsigned long long left" : "const unsigned (&left)[4]") +
         ", unsigned long long right) {\n"
         "  asm volatile(\"{.reg .pred adds; setp.eq.u32 adds, 0, 0; "
         "wgmma.mma_async.sync.aligned.m64n" + std::to_string(form.rows) + "k16.f32." + type + "." +
         type + " {" + listed(0, count, "%", "") + "}, " +
         (is_shared ? "%" + size : "{" + listed(count, 4, "%", "") + "}") + ", " + right +
         ", adds, 1, 1, " + (is_shared ? "0, 0" : "0") + ";}\"\n    : " +
         listed(0, count, "\"+f\"(total[", "])") + "\n    : " +
         (is_shared ? "\"l\"(left)" : listed(0, 4, "\"r\"(left[", "])")) +
         ", \"l\"(right));\n}\n";
}

Kernel kernel_for(int device, const Form& form) {
  std::string path;
  Loaded* loaded;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    path = directories[{form.bits, form.is_bfloat16}] + "/" + form.name();
    loaded = &devices[device];
  }
  const std::lock_guard<std::mutex> lock(loaded->mutex);
  const auto key = std::make_tuple(form.bits, form.is_bfloat16, form.name());
  const auto found = loaded->kernels.find(key);
  if (found != loaded->kernels.end()) return found->second;
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> binary(std::istreambuf_iterator<char>(file), {});
  if (binary.empty()) throw path + " is missing";
  const cuda::Context context(device);
  const cuda::WhileRecording relaxed;
  const Kernel kernel = {cuda::kernel(binary, "decode_product"), form.shared_bytes()};
  cuda::check(cuda::driver().set_attribute(kernel.function, 8, kernel.bytes), "cuFuncSetAttribute");
  return loaded->kernels[key] = kernel;
}

// Of an array of lines, which is copied in boxes of so many of them.
Map map_of(void* array, Type type, int bytes, int64_t width, int64_t lines, int box_width,
           int box_lines, Swizzle swizzle) {
  const uint64_t sizes[] = {static_cast<uint64_t>(width), static_cast<uint64_t>(lines)};
  const uint64_t pitch = bytes * width;
  const unsigned box[] = {static_cast<unsigned>(box_width), static_cast<unsigned>(box_lines)};
  const unsigned strides[] = {1, 1};
  constexpr int kPromoteTo128 = 2;
  Map map;
  cuda::check(cuda::driver().encode_map(&map, type, 2, array, sizes, &pitch, box, strides, 0,
                                        swizzle, kPromoteTo128, 0),
              "cuTensorMapEncodeTiled");
  return map;
}

// `more` holds pairs or scales of a kernel of few bits.
ffi::Error decode_product(int32_t device, void* stream, ffi::AnyBuffer x, ffi::AnyBuffer kernel,
                          ffi::RemainingArgs more, ffi::Result<ffi::AnyBuffer> out, int32_t groups,
                          int32_t parts, bool is_gated) {
  int num_rows = x.dimensions()[0], inputs = x.dimensions()[1];
  int is_wide = out->element_type() == ffi::DataType::F32, gates = is_gated, group_inputs = 0;
  int outputs = kernel.dimensions()[0];
  void *to = out->untyped_data(), *scales = nullptr;
  const int half = 32 * groups;
  try {
    Form form = {16, rounded_up(num_rows), groups, x.element_type() == ffi::DataType::BF16};
    const Type type = form.is_bfloat16 ? kBfloat16 : kFloat16;
    Map kernel_map, pairs_map = {};
    Map x_map = map_of(x.untyped_data(), type, 2, inputs, num_rows, 64, form.rows, kOf128);
    void* const weights = kernel.untyped_data();
    if (more.size() == 0) {
      kernel_map = map_of(weights, type, 2, inputs, outputs, 64, half, kOf128);
    } else if (kernel.element_type() == ffi::DataType::S16) {
      const ffi::AnyBuffer pairs = *more.get<ffi::AnyBuffer>(0);
      const int64_t num_groups = pairs.dimensions()[0], blocks = kernel.dimensions()[0];
      form.bits = 4, outputs = kernel.dimensions()[1], group_inputs = inputs / num_groups;
      kernel_map = map_of(weights, kInt16, 2, 32, blocks * outputs, 32, half, kOf64);
      const int of_step = std::max(1, form.inputs() / group_inputs);
      pairs_map = map_of(pairs.untyped_data(), kInt32, 4, outputs, num_groups, half, of_step, kPlain);
    } else {
      form.bits = 8, scales = (*more.get<ffi::AnyBuffer>(0)).untyped_data();
      kernel_map = map_of(weights, kBytes, 1, inputs, outputs, 128, half, kOf128);
    }
    const Kernel compiled = kernel_for(device, form);
    void* arguments[] = {&kernel_map, &pairs_map, &x_map,        &scales,  &to,   &num_rows,
                         &inputs,     &outputs,   &group_inputs, &is_wide, &gates};
    const unsigned blocks = (outputs + 2 * half - 1) / (2 * half) * parts;
    cuda::launch_clusters(compiled.function, blocks, parts, 128 * (groups + 1), compiled.bytes,
                          stream, arguments);
    return ffi::Error::Success();
  } catch (const std::string& problem) {
    return ffi::Error::Internal("decode_product: " + problem);
  }
}

}  // namespace

// Compiles a kernel into a file of a directory. Returns 0, or 1 and why it cannot be compiled.
extern "C" int compile_product(const char* nvrtc, const char* source, int bits, int rows,
                               int groups, int is_bfloat16, const char* to, char* why,
                               size_t size) {
  return cuda::told(why, size, [&] {
    const Form form = {bits, rows, groups, is_bfloat16};
    const std::vector<char> binary = cuda::compiled(
        nvrtc, (multiply(form) + source).c_str(), "decode_product.cu", "sm_90a",
        {
            "-DBITS=" + std::to_string(bits),
            "-DROWS=" + std::to_string(rows),
            "-DGROUPS=" + std::to_string(groups),
            "-DSTAGES=" + std::to_string(form.stages()),
            "-DIS_BFLOAT16=" + std::to_string(is_bfloat16),
        });
    std::ofstream file(std::string(to) + "/" + form.name(), std::ios::binary);
    file.write(binary.data(), binary.size());
    if (!file.flush()) throw std::string("cannot write to ") + to;
  });
}

// Says where the compiled kernels of weights and rows lie.
extern "C" void open_products(const char* directory, int bits, int is_bfloat16) {
  const std::lock_guard<std::mutex> lock(mutex);
  directories[{bits, is_bfloat16}] = directory;
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(DecodeProduct, decode_product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Ctx<ffi::PlatformStream<void*>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int32_t>("groups")
                                  .Attr<int32_t>("parts")
                                  .Attr<bool>("is_gated"),
                              {ffi::Traits::kCmdBufferCompatible});
