// CUDA's driver and its compiler (NVRTC), for kernels of our own that no library has.
//
// Only what is named here is needed of them, and looked up when it is first used, so that our
// sources compile on a machine without either. JAX's wheels for CUDA bring NVRTC.

#pragma once

#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

namespace cuda {

// An attribute of a launch, and a launch with some, as the driver's header has them.
struct Attribute {
  int which, unused;
  unsigned value[16];
};

struct Launch {
  unsigned blocks[3], threads[3], shared_bytes;
  void* stream;
  const Attribute* attributes;
  unsigned num_attributes;
};

// What is used of the driver and of NVRTC, with their own types spelled out.
struct Driver {
  int (*init)(unsigned);
  int (*attribute)(int*, int, int);
  int (*retain)(void**, int);
  int (*push)(void*);
  int (*pop)(void**);
  int (*can_access)(int*, int, int);
  int (*enable_access)(void*, unsigned);
  int (*allocate)(uint64_t*, size_t);
  int (*allocate_host)(void**, size_t, unsigned);
  int (*free_host)(void*);
  int (*fill)(uint64_t, unsigned char, size_t);
  int (*synchronize)();
  int (*load)(void**, const void*);
  int (*function)(void**, void*, const char*);
  int (*set_attribute)(void*, int, int);
  int (*recording)(int*);
  int (*launch)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*,
                void**, void**);
  int (*launch_as)(const Launch*, void*, void**, void**);
  int (*encode_map)(void*, int, unsigned, void*, const uint64_t*, const uint64_t*, const unsigned*,
                    const unsigned*, int, int, int, int);
};

struct Compiler {
  int (*create)(void**, const char*, const char*, int, const char**, const char**);
  int (*compile)(void*, int, const char**);
  int (*size)(void*, size_t*);
  int (*binary)(void*, char*);
  int (*log_size)(void*, size_t*);
  int (*log)(void*, char*);
};

// All of these throw a std::string that says what is wrong, but for this one, which writes what
// has been thrown. Returns 0, or 1 if something was.
template <typename Function>
int told(char* why, size_t size, Function function) {
  try {
    function();
    return 0;
  } catch (const std::string& problem) {
    std::snprintf(why, size, "%s", problem.c_str());
    return 1;
  }
}

inline void check(int status, const char* what) {
  if (status != 0) throw std::string(what) + " failed with status " + std::to_string(status);
}

inline void* opened(const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::string(path) + " cannot be loaded";
  return library;
}

template <typename Function>
void look_up(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (function == nullptr) throw std::string(name) + " is missing";
}

// The driver, opened once.
inline const Driver& driver() {
  static const Driver found = [] {
    Driver one;
    void* library = opened("libcuda.so.1");
    look_up(library, "cuInit", one.init);
    look_up(library, "cuDeviceGetAttribute", one.attribute);
    look_up(library, "cuDevicePrimaryCtxRetain", one.retain);
    look_up(library, "cuCtxPushCurrent_v2", one.push);
    look_up(library, "cuCtxPopCurrent_v2", one.pop);
    look_up(library, "cuDeviceCanAccessPeer", one.can_access);
    look_up(library, "cuCtxEnablePeerAccess", one.enable_access);
    look_up(library, "cuMemAlloc_v2", one.allocate);
    look_up(library, "cuMemHostAlloc", one.allocate_host);
    look_up(library, "cuMemFreeHost", one.free_host);
    look_up(library, "cuMemsetD8_v2", one.fill);
    look_up(library, "cuCtxSynchronize", one.synchronize);
    look_up(library, "cuModuleLoadData", one.load);
    look_up(library, "cuModuleGetFunction", one.function);
    look_up(library, "cuFuncSetAttribute", one.set_attribute);
    look_up(library, "cuThreadExchangeStreamCaptureMode", one.recording);
    look_up(library, "cuLaunchKernel", one.launch);
    look_up(library, "cuLaunchKernelEx", one.launch_as);
    look_up(library, "cuTensorMapEncodeTiled", one.encode_map);
    check(one.init(0), "cuInit");
    return one;
  }();
  return found;
}

// Makes the context that JAX uses of a device the one of this thread, while it lives.
class Context {
 public:
  explicit Context(int device) {
    void* context = nullptr;
    check(driver().retain(&context, device), "cuDevicePrimaryCtxRetain");
    check(driver().push(context), "cuCtxPushCurrent");
  }
  ~Context() {
    void* last = nullptr;
    driver().pop(&last);
  }
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;
};

// Lets this thread load kernels while it records a graph, while it lives.
class WhileRecording {
 public:
  WhileRecording() { driver().recording(&mode_); }
  ~WhileRecording() { driver().recording(&mode_); }
  WhileRecording(const WhileRecording&) = delete;
  WhileRecording& operator=(const WhileRecording&) = delete;

 private:
  int mode_ = 2;  // relaxed, and then what it was
};

// A source in CUDA C++ compiled for an architecture by the NVRTC at a path. `options` are the
// compiler's.
inline std::vector<char> compiled(const char* nvrtc, const char* source, const char* name,
                                  const std::string& architecture,
                                  std::vector<std::string> options) {
  Compiler compiler;
  void* library = opened(nvrtc);
  look_up(library, "nvrtcCreateProgram", compiler.create);
  look_up(library, "nvrtcCompileProgram", compiler.compile);
  look_up(library, "nvrtcGetCUBINSize", compiler.size);
  look_up(library, "nvrtcGetCUBIN", compiler.binary);
  look_up(library, "nvrtcGetProgramLogSize", compiler.log_size);
  look_up(library, "nvrtcGetProgramLog", compiler.log);
  options.push_back("--gpu-architecture=" + architecture);
  std::vector<const char*> given;
  for (const std::string& option : options) given.push_back(option.c_str());
  void* program = nullptr;
  check(compiler.create(&program, source, name, 0, nullptr, nullptr), "NVRTC");
  size_t size = 0;
  if (compiler.compile(program, given.size(), given.data()) != 0) {
    check(compiler.log_size(program, &size), "NVRTC");
    std::string log(size, '\0');
    check(compiler.log(program, &log[0]), "NVRTC");
    throw std::string(name) + " cannot be compiled: " + log.c_str();
  }
  check(compiler.size(program, &size), "NVRTC");
  std::vector<char> binary(size);
  check(compiler.binary(program, binary.data()), "NVRTC");
  return binary;
}

// The same for a device.
inline std::vector<char> compiled(const char* nvrtc, const char* source, const char* name,
                                  int device, const std::vector<std::string>& options) {
  int major = 0, minor = 0;
  check(driver().attribute(&major, 75, device), "cuDeviceGetAttribute");
  check(driver().attribute(&minor, 76, device), "cuDeviceGetAttribute");
  return compiled(nvrtc, source, name, "sm_" + std::to_string(10 * major + minor), options);
}

// Launches blocks in clusters of so many, which may read each other's shared memory.
inline void launch_clusters(void* function, unsigned blocks, unsigned of_cluster, unsigned threads,
                            unsigned shared_bytes, void* stream, void** arguments) {
  const Attribute cluster = {4, 0, {of_cluster, 1, 1}};
  const Launch how = {{blocks, 1, 1}, {threads, 1, 1}, shared_bytes, stream, &cluster, 1};
  check(driver().launch_as(&how, function, arguments, nullptr), "cuLaunchKernelEx");
}

// A kernel of a compiled source, in the context of this thread.
inline void* kernel(const std::vector<char>& binary, const char* name) {
  void *module = nullptr, *found = nullptr;
  check(driver().load(&module, binary.data()), "cuModuleLoadData");
  check(driver().function(&found, module, name), "cuModuleGetFunction");
  return found;
}

}  // namespace cuda
