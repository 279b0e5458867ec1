// A CUDA device for a torch that was built without CUDA: it counts eight GPUs, and whatever is asked of them is done.
//
// torch asks its backends for streams, events and the like before it computes anything, and a torch for CPUs alone has
// nobody to answer for CUDA. Nothing is computed here: tests/stand_in/gpu.py does that, on the CPU.
//
// Must be in the process before torch looks for its devices, which it does once: LD_PRELOAD.

#include <cstdlib>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>

namespace {

constexpr c10::DeviceIndex kCount = 8;

c10::DeviceIndex own_index() {
  const char* rank = std::getenv("LOCAL_RANK");
  return rank ? std::atoi(rank) : 0;
}

c10::Device own_device() {
  return c10::Device(c10::DeviceType::CUDA, own_index());
}

// The current device and its only stream; events have always happened.
struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, own_device()); }
  c10::Device exchangeDevice(c10::Device) const override { return own_device(); }
  c10::Device getDevice() const override { return own_device(); }
  c10::DeviceIndex deviceCount() const noexcept override { return kCount; }
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};

c10::impl::DeviceGuardImplRegistrar guard(c10::DeviceType::CUDA, new Guard());

}  // namespace

namespace at {

// torch looks this class up by its name.
struct CUDAHooks : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return kCount; }
  c10::DeviceIndex deviceCount() const override { return kCount; }
  c10::DeviceIndex current_device() const override { return own_index(); }
  c10::DeviceIndex getCurrentDevice() const override { return own_index(); }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return own_index(); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return own_index(); }
  bool isPinnedPtr(const void*) const override { return false; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  const Generator& getDefaultGenerator(c10::DeviceIndex) const override { return detail::getDefaultCPUGenerator(); }
};
REGISTER_CUDA_HOOKS(CUDAHooks)

}  // namespace at

namespace c10d {

// Without one DDP's logger ends the process.
struct StandInTimer : Timer {
  explicit StandInTimer(c10::Device) {}
  std::optional<int64_t> measureDifference(Event, Event) override { return std::nullopt; }
};
C10_REGISTER_TYPED_CLASS(TimerRegistry, c10::kCUDA, StandInTimer)

}  // namespace c10d
