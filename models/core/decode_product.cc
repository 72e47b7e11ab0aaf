// Starts the product of a decode step's rows (`decode_product.cu`), and compiles it for sizes of
// steps, ahead of the programs that call it.

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

constexpr unsigned kInputs = 64;        // of a stage
constexpr int kMostStages = 8;          // of a ring
constexpr int kMostBytes = 220 * 1024;  // of shared memory that a ring takes
constexpr int kFewRows = 8, kStepRows = 32;  // kernels are for so many rows, and for multiples
constexpr int kFloat16 = 6, kBfloat16 = 9, kSwizzle128 = 3, kPromote128 = 2;  // the driver's

struct Kernel {
  void* function;
  int bytes;
};

// What the copy engine is told of an array.
struct alignas(64) Map {
  char bytes[128];
};

std::mutex mutex;
std::map<std::string, std::string> directories;          // of compiled kernels, by type
std::map<std::tuple<int, std::string>, Kernel> kernels;  // by device and name

const char* type_of(bool is_bfloat16) { return is_bfloat16 ? "bf16" : "f16"; }

int rounded_up(int rows) {
  return rows <= kFewRows ? kFewRows : (rows + kStepRows - 1) / kStepRows * kStepRows;
}

int stage_bytes(int rows, int groups) { return (64 * groups + rows) * kInputs * 2; }

int num_stages(int rows, int groups) {
  return std::min(kMostStages, kMostBytes / stage_bytes(rows, groups));
}

// A ring, or the sums that lie there afterwards.
int shared_bytes(int rows, int groups) {
  return std::max(num_stages(rows, groups) * stage_bytes(rows, groups),
                  rows * (64 * groups + 4) * 4);
}

std::string name_of(int rows, int groups, const std::string& type) {
  return std::to_string(rows) + "x" + std::to_string(groups) + "." + type;
}

// The function `multiply` of the source: 64 outputs times so many rows, whose sums are as many
// operands.
std::string multiply(int rows, const std::string& type) {
  const int count = rows / 2;
  std::string places, sums;
  for (int i = 0; i < count; ++i) {
    const std::string number = std::to_string(i), comma = i == 0 ? "" : ", ";
    places += comma + "%" + number;
    sums += comma + "\"+f\"(total[" + number + "])";
  }
  const std::string left = "%" + std::to_string(count), right = "%" + std::to_string(count + 1);
  return "__device__ __forceinline__ void multiply(float (&total)[" + std::to_string(count) +
         "], unsigned long long left, unsigned long long right) {\n"
         "  asm volatile(\"{.reg .pred adds; setp.eq.u32 adds, 0, 0; "
         "wgmma.mma_async.sync.aligned.m64n" + std::to_string(rows) + "k16.f32." + type + "." +
         type + " {" + places + "}, " + left + ", " + right + ", adds, 1, 1, 0, 0;}\"\n    : " +
         sums + " : \"l\"(left), \"l\"(right));\n}\n";
}

const Kernel& kernel_for(int device, int rows, int groups, const std::string& type) {
  const std::string name = name_of(rows, groups, type);
  const auto found = kernels.find({device, name});
  if (found != kernels.end()) return found->second;
  const std::string path = directories[type] + "/" + name;
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> binary(std::istreambuf_iterator<char>(file), {});
  if (binary.empty()) throw path + " is missing";
  const cuda::Context context(device);
  const cuda::WhileRecording relaxed;
  const Kernel kernel = {cuda::kernel(binary, "decode_product"), shared_bytes(rows, groups)};
  cuda::check(cuda::driver().set_attribute(kernel.function, 8, kernel.bytes), "cuFuncSetAttribute");
  return kernels[{device, name}] = kernel;
}

// Of an array [lines, inputs], which is copied in boxes of so many lines.
Map map_of(const ffi::AnyBuffer& array, unsigned lines) {
  const auto shape = array.dimensions();
  const uint64_t sizes[] = {static_cast<uint64_t>(shape[1]), static_cast<uint64_t>(shape[0])};
  const uint64_t pitch = 2 * sizes[0];
  const unsigned box[] = {kInputs, lines}, strides[] = {1, 1};
  const int type = array.element_type() == ffi::DataType::BF16 ? kBfloat16 : kFloat16;
  Map map;
  cuda::check(cuda::driver().encode_map(&map, type, 2, array.untyped_data(), sizes, &pitch, box,
                                        strides, 0, kSwizzle128, kPromote128, 0),
              "cuTensorMapEncodeTiled");
  return map;
}

ffi::Error decode_product(int32_t device, void* stream, ffi::AnyBuffer x, ffi::AnyBuffer kernel,
                          ffi::Result<ffi::AnyBuffer> out, int32_t groups, int32_t parts,
                          bool is_gated) {
  const std::lock_guard<std::mutex> lock(mutex);
  const bool is_bfloat16 = x.element_type() == ffi::DataType::BF16;
  int num_rows = x.dimensions()[0], inputs = x.dimensions()[1], outputs = kernel.dimensions()[0];
  int is_wide = out->element_type() == ffi::DataType::F32, gates = is_gated;
  void* to = out->untyped_data();
  try {
    const int rows = rounded_up(num_rows);
    const Kernel& compiled = kernel_for(device, rows, groups, type_of(is_bfloat16));
    Map kernel_map = map_of(kernel, 32 * groups), x_map = map_of(x, rows);
    void* arguments[] = {&kernel_map, &x_map, &to, &num_rows, &inputs, &outputs, &is_wide, &gates};
    const unsigned blocks = (outputs + 64 * groups - 1) / (64 * groups) * parts;
    cuda::launch_clusters(compiled.function, blocks, parts, 128 * (groups + 1), compiled.bytes,
                          stream, arguments);
    return ffi::Error::Success();
  } catch (const std::string& problem) {
    return ffi::Error::Internal("decode_product: " + problem);
  }
}

}  // namespace

// Whether the first device is of the generation. Returns 0, or 1 and why it is not known.
extern "C" int is_hopper(int* is, char* why, size_t size) {
  return cuda::told(why, size, [&] {
    int major = 0;
    cuda::check(cuda::driver().attribute(&major, 75, 0), "cuDeviceGetAttribute");
    *is = major == 9;
  });
}

// Compiles the kernel of so many rows and groups into a file of a directory. Returns 0, or 1 and
// why it cannot be compiled.
extern "C" int compile_product(const char* nvrtc, const char* source, int rows, int groups,
                               int is_bfloat16, const char* to, char* why, size_t size) {
  return cuda::told(why, size, [&] {
    const char* const type = type_of(is_bfloat16);
    const std::string text = multiply(rows, type) + source;
    const std::vector<char> binary =
        cuda::compiled(nvrtc, text.c_str(), "decode_product.cu", "sm_90a",
                       {
                           "-DROWS=" + std::to_string(rows),
                           "-DGROUPS=" + std::to_string(groups),
                           "-DSTAGES=" + std::to_string(num_stages(rows, groups)),
                           "-DIS_BFLOAT16=" + std::to_string(is_bfloat16),
                       });
    std::ofstream file(std::string(to) + "/" + name_of(rows, groups, type), std::ios::binary);
    file.write(binary.data(), binary.size());
    if (!file.flush()) throw std::string("cannot write to ") + to;
  });
}

// Says where the compiled kernels of a type lie.
extern "C" void open_products(const char* directory, int is_bfloat16) {
  const std::lock_guard<std::mutex> lock(mutex);
  directories[type_of(is_bfloat16)] = directory;
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(DecodeProduct, decode_product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Ctx<ffi::PlatformStream<void*>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int32_t>("groups")
                                  .Attr<int32_t>("parts")
                                  .Attr<bool>("is_gated"),
                              {ffi::Traits::kCmdBufferCompatible});
