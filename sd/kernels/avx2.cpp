// Layers, group norms and attention by AVX2 or AVX-512; sd/kernels/avx2.py compiles it and says what it computes.
//
// Vectors are GCC's and have PANEL / 2 lanes: 8 for AVX2, 16 for AVX-512. Sums are in fp32, and in fp64 where a norm merges those
// of its blocks. With avx512_bf16, layers and norms take bf16 too: direct products multiply pairs of channels, and tiles are
// converted to fp32 where they are transformed.
//
// A convolution is a matrix product whose rows are the positions of the output. Their inputs are found by pointers, one for each
// position and tap, and are not copied (indirect convolution, Dukhan 2019, arXiv 1907.02129). Blocks as of Goto and van de Geijn
// 2008: a chunk of the weights stays in a cache while all positions of a block use it. Most convolutions of 3 x 3 taps are
// products too, but of transformed inputs, copied a block at a time (Winograd's algorithm, Lavin and Gray 2016, arXiv 1509.09308).
// Attention is flash attention (Dao and others 2022).
#include <immintrin.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

namespace {
using torch::stable::Tensor;

constexpr int VECTORS = 2, LANES = PANEL / VECTORS;
typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef uint16_t Bf16;
struct __attribute__((may_alias)) Pair {  // of bf16, which one lane multiplies with two others
  int32_t bits;
};
template <typename Value>
using Element = std::conditional_t<std::is_same_v<Value, float>, float, Pair>;  // of a direct product
constexpr int LINE = 16;                       // floats of a line of a cache
constexpr int ROWS = LANES == 16 ? 12 : 6;     // rows of a product: 24 of 32 registers hold its sums, or 12 of 16
constexpr int BLOCK = 240;                     // positions that share a chunk of weights
constexpr int CHUNK = 512;                     // elements of the channels times taps of a chunk
constexpr int PREFETCHED = 256 * LINE;         // elements of weights ahead, for the memory's latency
constexpr int KEYS = 64;                       // of a block of attention
constexpr int TILES = 48;                      // limit of a block, which transforms the weights once; higher for few channels
constexpr int INPUTS = 96 << 10;               // transformed values of a block with more tiles, for the second cache
constexpr int DEPTH = 96;                      // channels of a chunk of transformed weights
constexpr int NORMED = 16 << 10;               // elements of a block of a norm, which stay in a cache
constexpr int NORMED_ROWS = 64;                // of it at least: its moments take a time for each channel
constexpr int MERGED = 1 << 10;                // blocks whose moments are worth another thread
const float ZEROS[CHUNK] = {};

inline Lanes plus_products(Lanes sum, float left, Lanes right) { return sum + left * right; }
inline Lanes load(const float* x) { return *(const Lanes*)x; }
inline void store(float* x, Lanes value) { *(Lanes*)x = value; }
inline float to_float(float x) { return x; }
inline Lanes values_of(const float* x, int) { return load(x); }  // of elements: their first or second ones
inline void copy(const float* from, int64_t count, float* to) { std::copy_n(from, count, to); }
#ifdef __AVX512BF16__
inline Lanes plus_products(Lanes sum, Pair left, Lanes right) {
  return (Lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(left.bits), (__m512bh)right);
}
inline Lanes load(const Bf16* x) {
  return (Lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x)), 16);
}
inline void store(Bf16* x, Lanes value) { _mm256_storeu_si256((__m256i*)x, (__m256i)_mm512_cvtneps_pbh((__m512)value)); }
inline float to_float(Bf16 x) { return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(x << 16))); }
inline Lanes values_of(const Pair* x, int second) {
  const __m512i pairs = _mm512_loadu_si512(x);
  return (Lanes)(second ? _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000)) : _mm512_slli_epi32(pairs, 16));
}
inline void copy(const float* from, int64_t count, Bf16* to) {  // of whole vectors, of which `count` values are copied
  for (int64_t i = 0; i < count; i += LANES) {
    Bf16 rounded[LANES];
    store(rounded, load(from + i));
    std::copy_n(rounded, std::min<int64_t>(LANES, count - i), to + i);
  }
}
#endif

// Of a product: consecutive inputs and weights from memory or from a cache, or inputs at a distance.
enum Kind { STREAMED, CACHED, STRIDED };

int64_t panels_of(int64_t channels) { return (channels + PANEL - 1) / PANEL; }

// Rows of PANEL sums, and, unless nullptr, where they are rounded to bf16 instead of stored.
struct Target {
  float* sums;
  int64_t stride;
  Bf16* rounded;
  int64_t rounded_stride;
  Target from(int64_t row) const {
    return {sums + row * stride, stride, rounded ? rounded + row * rounded_stride : nullptr, rounded_stride};
  }
};

// out [R][PANEL] = start (a row, or out where nullptr) + the sum over taps of rows [R][depth] . weight [depth][PANEL].
// rows: pointers [taps][count], of which R are used, each then offset; nullptr is a row of zeros.
template <Kind kind, int R, typename Item>
void multiply(const Item* const* rows, int64_t count, int64_t taps, int64_t offset, int64_t depth, int64_t step,
              const Item* weight, const float* start, const Target& out) {
  Lanes sums[R][VECTORS];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < VECTORS; ++v) sums[r][v] = load((start ? start : out.sums + r * out.stride) + v * LANES);
  for (int64_t tap = 0; tap < taps; ++tap, rows += count) {
    const Item* row[R];
    for (int r = 0; r < R; ++r) row[r] = rows[r] ? rows[r] + offset : (const Item*)ZEROS;
#pragma GCC unroll 4
    for (int64_t k = 0, at = 0; k < depth; ++k, at += kind == STRIDED ? step : 1, weight += PANEL) {
      for (int line = 0; kind == STREAMED && line < PANEL; line += LINE) __builtin_prefetch(weight + PREFETCHED + line);
      Lanes right[VECTORS];
      for (int v = 0; v < VECTORS; ++v) right[v] = load((const float*)(weight + v * LANES));
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = plus_products(sums[r][v], row[r][at], right[v]);
    }
  }
#ifdef __AVX512BF16__
  if (out.rounded) {
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < VECTORS; ++v) store(out.rounded + r * out.rounded_stride + v * LANES, sums[r][v]);
    return;
  }
#endif
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < VECTORS; ++v) store(out.sums + r * out.stride + v * LANES, sums[r][v]);
}

// The same for any number of rows, in products as even as possible: few rows have too few sums to hide an addition's latency.
template <Kind kind, typename Item>
void multiply_all(const Item* const* rows, int64_t count, int64_t taps, int64_t offset, int64_t depth, int64_t step,
                  const Item* weight, const float* start, const Target& out) {
  constexpr auto by_rows = []<Kind of, size_t... R>(std::integral_constant<Kind, of>, std::index_sequence<R...>) {
    return std::array{multiply<of, R + 1, Item>...};
  };
  static constexpr auto FIRST = by_rows(std::integral_constant<Kind, kind>(), std::make_index_sequence<ROWS>());
  static constexpr auto REST =  // to which the weights are in a cache
      by_rows(std::integral_constant<Kind, kind == STREAMED ? CACHED : kind>(), std::make_index_sequence<ROWS>());
  for (int64_t i = 0, left = (count + ROWS - 1) / ROWS, now; i < count; i += now, --left) {
    now = (count - i + left - 1) / left;
    (i ? REST : FIRST)[now - 1](rows + i, count, taps, offset, depth, step, weight, start, out.from(i));
  }
}

bool is_float(const Tensor& x) { return x.scalar_type() == torch::headeronly::ScalarType::Float; }

Tensor empty(const std::vector<int64_t>& size, int32_t dtype) {  // the stable operator takes twice as long
  std::vector<int64_t> strides(size.size(), 1);
  for (size_t i = size.size() - 1; i; --i) strides[i - 1] = strides[i] * std::max<int64_t>(size[i], 1);
  AtenTensorHandle tensor;
  const auto error = aoti_torch_empty_strided(size.size(), size.data(), strides.data(), dtype,
                                              aoti_torch_device_type_cpu(), 0, &tensor);
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "no memory for the output");
  return Tensor(tensor);
}

// A distance of rows of so many floats, odd in lines: a cache holds few lines whose distance is a power of two.
int64_t apart(int64_t floats) { return ((floats + LINE - 1) / LINE | 1) * LINE; }

// Memory of this thread that its next use overwrites. It is kept: to get and clear it anew takes longer than some convolutions.
float* workspace(size_t floats) {
  thread_local std::vector<float> memory;
  if (memory.size() < floats + LINE) {
    memory = {};  // before the larger one is there
    memory = std::vector<float>(floats + LINE);
  }
  return memory.data() + -(uintptr_t)memory.data() / sizeof(float) % LINE;
}

struct Shape {
  int64_t images, height, width, channels, out_height, out_width, out_channels, kernel, stride, padding;
};

// The address of the input of each tap and position, [taps][count]; nullptr outside of the image.
template <typename Item>
void find_inputs(const Item* x, const Shape& s, int64_t begin, int64_t count, const Item** inputs) {
  int64_t column = begin % s.out_width, line = begin / s.out_width % s.out_height;
  int64_t image = begin / (s.out_width * s.out_height);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t tap = 0; tap < s.kernel * s.kernel; ++tap) {
      const int64_t y = line * s.stride - s.padding + tap / s.kernel, z = column * s.stride - s.padding + tap % s.kernel;
      const bool inside = y >= 0 && y < s.height && z >= 0 && z < s.width;
      inputs[tap * count + i] = inside ? x + ((image * s.height + y) * s.width + z) * s.channels : nullptr;
    }
    if (++column == s.out_width) {
      column = 0;
      if (++line == s.out_height) line = 0, ++image;
    }
  }
}

// x [images, height, width, channels], out [images, out_height, out_width, out_channels]; weight [panels, taps, channels, PANEL],
// or of pairs of channels.
template <typename Value>
void convolve(const Value* values, const Element<Value>* weight, const Value* bias, Value* out, Shape s) {
  const auto x = (const Element<Value>*)values;
  s.channels = s.channels * sizeof(Value) / sizeof(*x);
  const int64_t taps = s.kernel * s.kernel, positions = s.images * s.out_height * s.out_width;
  const int64_t panels = panels_of(s.out_channels);
  const int64_t chunks = (s.channels + CHUNK - 1) / CHUNK, depth = (s.channels + chunks - 1) / chunks;
  const int64_t together = std::max<int64_t>(1, CHUNK / depth);  // taps of a chunk
  // Even, so that threads, which have the same number of units, have the same work.
  const int64_t blocks = (positions + BLOCK - 1) / BLOCK, block = (positions + blocks - 1) / blocks;
  torch::stable::parallel_for(0, blocks * panels, 1, [&](int64_t first, int64_t last) {
    std::vector<const Element<Value>*> inputs(taps * block);
    alignas(64) float narrow[BLOCK * PANEL], start[PANEL];
    int64_t begin = -1, count = 0;
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t panel = unit % panels, width = std::min<int64_t>(PANEL, s.out_channels - panel * PANEL);
      if (begin != unit / panels * block) {
        begin = unit / panels * block;
        count = std::min(block, positions - begin);
        find_inputs(x, s, begin, count, inputs.data());
      }
      Value* const wide = out + begin * s.out_channels + panel * PANEL;
      const bool whole = width == PANEL, in_place = whole && std::is_same_v<Value, float>;
      Target target = {in_place ? (float*)wide : narrow, in_place ? s.out_channels : PANEL, nullptr, s.out_channels};
      for (int i = 0; i < PANEL; ++i) start[i] = bias && i < width ? to_float(bias[panel * PANEL + i]) : 0.0f;
      for (int64_t tap = 0; tap < taps; tap += together)
        for (int64_t channel = 0; channel < s.channels; channel += depth) {
          if (whole && !in_place && tap + together >= taps && channel + depth >= s.channels) target.rounded = (Bf16*)wide;
          multiply_all<STREAMED>(inputs.data() + tap * count, count, std::min(together, taps - tap), channel,
                                 std::min(depth, s.channels - channel), 1,
                                 weight + ((panel * taps + tap) * s.channels + channel) * PANEL,
                                 tap || channel ? nullptr : start, target);
        }
      for (int64_t i = 0; !whole && i < count; ++i) copy(narrow + i * PANEL, width, wide + i * s.out_channels);
    }
  });
}

// Winograd's convolution of 3 x 3 taps and stride 1: for a tile of 2 x 2 outputs 16 products instead of 36, or for one of 4 x 4
// outputs 36 instead of 144. The transform of a square of vectors is one of each of its columns, then of each row of the results.
template <int N>
struct Line {  // of a square; std::array would drop the attributes of Lanes
  Lanes values[N];
  Lanes& operator[](int i) { return values[i]; }
  const Lanes& operator[](int i) const { return values[i]; }
};

// The tile's polynomials are evaluated at 0, 1, -1 and infinity.
inline Line<4> of_inputs(Line<4> x) { return {x[0] - x[2], x[1] + x[2], x[2] - x[1], x[1] - x[3]}; }

inline Line<4> of_weights(Line<3> x, Line<4>) {
  const Lanes even = (x[0] + x[2]) * 0.5f, odd = x[1] * 0.5f;
  return {x[0], even + odd, even - odd, x[2]};
}

inline Line<2> of_products(Line<4> x) { return {x[0] + x[1] + x[2], x[1] - x[2] - x[3]}; }

// At 0, +-NEAR, +-FAR and infinity; the error is half of that with 0, +-1 and +-2.
constexpr float NEAR = 0.70710678f, FAR = 1.41421356f;

inline Line<6> of_inputs(Line<6> x) {
  const Lanes near = (x[3] - 2.0f * x[1]) * NEAR, far = (x[3] - 0.5f * x[1]) * FAR;
  const Lanes even = x[4] - 2.0f * x[2], other = x[4] - 0.5f * x[2];
  return {x[0] - 2.5f * x[2] + x[4], even + near, even - near, other + far, other - far, x[1] - 2.5f * x[3] + x[5]};
}

inline Line<6> of_weights(Line<3> x, Line<6>) {
  const Lanes even = (x[0] + 0.5f * x[2]) * (-2.0f / 3), near = x[1] * (NEAR * -2 / 3);
  const Lanes other = (x[0] + 2.0f * x[2]) * (1.0f / 6), far = x[1] * (FAR / 6);
  return {x[0], even + near, even - near, other + far, other - far, x[2]};
}

inline Line<4> of_products(Line<6> x) {
  const Lanes even = x[1] + x[2], near = (x[1] - x[2]) * NEAR, other = x[3] + x[4], far = (x[3] - x[4]) * FAR;
  return {x[0] + even + other, near + far, 0.5f * even + 2.0f * other, 0.5f * near + 2.0f * far + x[5]};
}

template <int FROM, int TO, typename Read, typename Transform, typename Write>
inline __attribute__((always_inline)) void transform_square(Read read, Transform transform, Write write) {
  Line<TO> columns[FROM];
#pragma GCC unroll 6
  for (int i = 0; i < FROM; ++i) {
    Line<FROM> column;
#pragma GCC unroll 6
    for (int j = 0; j < FROM; ++j) column[j] = read(j, i);
    columns[i] = transform(column);
  }
#pragma GCC unroll 6
  for (int j = 0; j < TO; ++j) {
    Line<FROM> row;
#pragma GCC unroll 6
    for (int i = 0; i < FROM; ++i) row[i] = columns[i][j];
    const Line<TO> values = transform(row);
#pragma GCC unroll 6
    for (int i = 0; i < TO; ++i) write(j, i, values[i]);
  }
}

// OUTPUTS: side of a tile. SIDE: of its inputs and of its products.
template <int OUTPUTS>
struct Tiles {
  static constexpr int SIDE = OUTPUTS + 2, SQUARE = SIDE * SIDE;
  int64_t high, wide, count;

  explicit Tiles(const Shape& s)
      : high((s.height + OUTPUTS - 1) / OUTPUTS), wide((s.width + OUTPUTS - 1) / OUTPUTS), count(s.images * high * wide) {}

  // Time in products of a direct convolution in fp32 for each weight, measured: the transforms of a tile take a fraction of the
  // time of its products, that of the weights a constant.
  int64_t cost() const {
    return LANES == 16 ? count * SQUARE * 6 / 5 + (OUTPUTS == 2 ? 55 : 145) : count * SQUARE * 3 / 2 + (OUTPUTS == 2 ? 70 : 190);
  }

  // pixels: inputs of a tile, nullptr outside of the image. out: SQUARE rows of `stride`.
  template <typename Value>
  static void transform_inputs(const Value* const* pixels, int64_t channels, float* out, int64_t stride) {
    for (int64_t k = 0; k < channels; k += LANES)
      transform_square<SIDE, SIDE>(
          [&](int j, int i) { return pixels[j * SIDE + i] ? load(pixels[j * SIDE + i] + k) : Lanes{}; },
          [](Line<SIDE> x) { return of_inputs(x); },
          [&](int j, int i, Lanes value) { store(out + (j * SIDE + i) * stride + k, value); });
  }

  // weight: 9 rows of `step` elements, of which `count` each. out: SQUARE rows of `stride`. parts: values of an element.
  template <int parts, typename Item>
  static void transform_weights(const Item* weight, int64_t step, int64_t count, float* out, int64_t stride) {
    for (int64_t k = 0; k < count; k += LANES)
      for (int second = 0; second < parts; ++second)
        transform_square<3, SIDE>(
            [&](int j, int i) { return values_of(weight + (j * 3 + i) * step + k, second); },
            [](Line<3> x) { return of_weights(x, Line<SIDE>()); },
            [&](int j, int i, Lanes value) {
              store(out + (j * SIDE + i) * stride + (k / PANEL * parts + second) * PANEL + k % PANEL, value);
            });
  }

  // products: SQUARE rows of `stride`. outputs: the pixels of a tile, each then offset; nullptr outside of the image.
  template <typename Value>
  static void transform_products(const float* products, int64_t stride, Lanes bias, Value* const* outputs, int64_t offset) {
    transform_square<SIDE, OUTPUTS>([&](int j, int i) { return load(products + (j * SIDE + i) * stride + offset); },
                                    [](Line<SIDE> x) { return of_products(x); },
                                    [&](int j, int i, Lanes value) {
                                      Value* const output = outputs[j * OUTPUTS + i];
                                      if (output) store(output + offset, value + bias);
                                    });
  }
};

// As `convolve`, of 3 x 3 taps, stride 1 and padding 1, with channels in multiples of LANES.
template <int OUTPUTS, typename Value>
void convolve_tiles(const Value* x, const Element<Value>* weight, const Value* bias, Value* out, Shape s) {
  constexpr int PARTS = sizeof(*weight) / sizeof(Value);
  constexpr int SIDE = Tiles<OUTPUTS>::SIDE, SQUARE = Tiles<OUTPUTS>::SQUARE, PIXELS = OUTPUTS * OUTPUTS;
  const Tiles<OUTPUTS> tiles(s);
  const int64_t most = std::max<int64_t>(TILES, INPUTS / SQUARE / s.channels), blocks = (tiles.count + most - 1) / most;
  const int64_t block = (tiles.count + blocks - 1) / blocks, panels = panels_of(s.out_channels);
  const int64_t chunks = (s.channels + DEPTH - 1) / DEPTH, chunk = (s.channels + 2 * chunks - 1) / (2 * chunks) * 2;
  const int64_t input_row = apart(block * s.channels), weight_row = apart(chunk * PANEL), product_row = apart(block * PANEL);
  torch::stable::parallel_for(0, blocks * panels, 1, [&](int64_t first, int64_t last) {
    float* const weights = workspace(SQUARE * (weight_row + product_row + input_row));
    float *const products = weights + SQUARE * weight_row, *const inputs = products + SQUARE * product_row;
    std::vector<const float*> rows(SQUARE * block);
    alignas(64) Value narrow[PIXELS * PANEL];
    alignas(64) float start[PANEL];
    int64_t begin = -1, count = 0;
    // A square of pixels that begins `from` lines and columns behind a tile's first output; -1 outside of the image.
    const auto find_pixels = [&](int64_t tile, int64_t from, int64_t side, int64_t* pixels) {
      const int64_t top = tile / tiles.wide % tiles.high * OUTPUTS + from, left = tile % tiles.wide * OUTPUTS + from;
      const int64_t image = tile / tiles.wide / tiles.high;
      for (int64_t line = top; line < top + side; ++line)
        for (int64_t column = left; column < left + side; ++column) {
          const bool inside = line >= 0 && line < s.height && column >= 0 && column < s.width;
          *pixels++ = inside ? (image * s.height + line) * s.width + column : -1;
        }
    };
    for (int64_t unit = first; unit < last; ++unit) {
      if (begin != unit / panels * block) {
        begin = unit / panels * block;
        count = std::min(block, tiles.count - begin);
        for (int64_t i = 0; i < count; ++i) {
          int64_t pixels[SQUARE];
          const Value* of_tile[SQUARE];
          find_pixels(begin + i, -1, SIDE, pixels);
          for (int j = 0; j < SQUARE; ++j) {
            of_tile[j] = pixels[j] < 0 ? nullptr : x + pixels[j] * s.channels;
            rows[j * count + i] = inputs + j * input_row + i * s.channels;
          }
          tiles.transform_inputs(of_tile, s.channels, inputs + i * s.channels, input_row);
        }
      }
      const int64_t panel = unit % panels, width = std::min<int64_t>(PANEL, s.out_channels - panel * PANEL);
      for (int64_t channel = 0; channel < s.channels; channel += chunk) {
        const int64_t depth = std::min(chunk, s.channels - channel);
        tiles.template transform_weights<PARTS>(weight + (panel * 9 * s.channels + channel) / PARTS * PANEL,
                                                s.channels / PARTS * PANEL, depth / PARTS * PANEL, weights, weight_row);
        for (int j = 0; j < SQUARE; ++j)
          multiply_all<CACHED>(rows.data() + j * count, count, 1, channel, depth, 1, weights + j * weight_row,
                               channel ? nullptr : ZEROS, {products + j * product_row, PANEL});
      }
      for (int i = 0; i < PANEL; ++i) start[i] = bias && i < width ? to_float(bias[panel * PANEL + i]) : 0.0f;
      for (int64_t i = 0; i < count; ++i) {
        int64_t pixels[PIXELS];
        Value *of_tile[PIXELS], *targets[PIXELS];
        find_pixels(begin + i, 0, OUTPUTS, pixels);
        for (int j = 0; j < PIXELS; ++j) {
          of_tile[j] = pixels[j] < 0 ? nullptr : out + pixels[j] * s.out_channels + panel * PANEL;
          targets[j] = width == PANEL || !of_tile[j] ? of_tile[j] : narrow + j * PANEL;
        }
        for (int64_t at = 0; at < PANEL; at += LANES)
          tiles.transform_products(products + i * PANEL, product_row, load(start + at), targets, at);
        for (int j = 0; j < PIXELS; ++j)
          if (targets[j] != of_tile[j]) std::copy_n(targets[j], width, of_tile[j]);
      }
    }
  });
}

template <typename Value>
Tensor layer_of(Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t out_channels, int64_t kernel, int64_t stride,
                int64_t padding, int32_t dtype) {
  constexpr int PARTS = sizeof(Element<Value>) / sizeof(Value);
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  const bool is_rows = kernel == 1 && stride == 1 && padding == 0;
  const auto reaches = [&](int side) { return kernel > 0 && stride > 0 && padding >= 0 && x.size(side) + 2 * padding >= kernel; };
  STD_TORCH_CHECK(x.dim() > 0 && x.size(-1) > 0 && (is_rows || (x.dim() == 4 && reaches(1) && reaches(2))) &&
                      weight.dim() == 3 + PARTS && weight.size(0) == panels_of(out_channels) && weight.size(1) == kernel * kernel &&
                      weight.size(2) * PARTS == x.size(-1) && weight.size(3) == PANEL &&
                      (PARTS == 1 || weight.size(4) == PARTS) && weight.is_contiguous() &&
                      (!bias || (bias->numel() == out_channels && bias->is_contiguous())),
                  "avx2_layer: the shapes of input, weight and bias do not match");
  std::vector<int64_t> size(x.sizes().begin(), x.sizes().end());
  Shape s{1, 1, 1, size.back(), 1, 1, out_channels, kernel, stride, padding};
  size.back() = out_channels;
  if (!is_rows) {
    s.images = size[0], s.height = size[1], s.width = size[2];
    size[1] = s.out_height = (s.height + 2 * padding - kernel) / stride + 1;
    size[2] = s.out_width = (s.width + 2 * padding - kernel) / stride + 1;
  } else {
    s.width = s.out_width = x.numel() / s.channels;
  }
  Tensor out = empty(size, dtype);
  if (!out.numel()) return out;
  auto compute = convolve<Value>;
  if (kernel == 3 && stride == 1 && padding == 1 && s.channels % LANES == 0) {
    int64_t least = s.images * s.height * s.width * 9 / PARTS;
    const auto choose = [&](int64_t cost, auto by_tiles) {
      if (cost < least) least = cost, compute = by_tiles;
    };
    if constexpr (PARTS == 1) choose(Tiles<2>(s).cost(), convolve_tiles<2, Value>);  // never less for pairs
    choose(Tiles<4>(s).cost(), convolve_tiles<4, Value>);
  }
  compute((const Value*)x.data_ptr(), (const Element<Value>*)weight.data_ptr(), bias ? (const Value*)bias->data_ptr() : nullptr,
          (Value*)out.data_ptr(), s);
  return out;
}

Tensor layer(Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t out_channels, int64_t kernel, int64_t stride,
             int64_t padding) {
  const auto all = [&](auto dtype) {
    return x.scalar_type() == dtype && weight.scalar_type() == dtype && (!bias || bias->scalar_type() == dtype);
  };
#ifdef __AVX512BF16__
  if (all(torch::headeronly::ScalarType::BFloat16))
    return layer_of<Bf16>(x, weight, bias, out_channels, kernel, stride, padding, aoti_torch_dtype_bfloat16());
#endif
  STD_TORCH_CHECK(all(torch::headeronly::ScalarType::Float), "avx2_layer: computes in fp32, or with avx512_bf16 in bf16");
  return layer_of<float>(x, weight, bias, out_channels, kernel, stride, padding, aoti_torch_dtype_float32());
}

inline Lanes larger(Lanes x, Lanes y) { return x > y ? x : y; }  // y where either is NaN

Lanes power_of_two(Lanes x) {  // of x <= 0: Taylor polynomial on [-1/2, 1/2], relative error 1e-7
  constexpr float ROUNDS = 3 << 22;  // plus which a small number is rounded, with its integer in the lowest bits
  x = larger(Lanes{} - 126.0f, x);  // in this order NaN stays NaN
  const Lanes shifted = x + ROUNDS, part = x - (shifted - ROUNDS);
  Lanes sum = Lanes{} + 1.5252734e-5f;
  for (float term : {1.5403530e-4f, 1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 0.24022651f, 0.69314718f, 1.0f})
    sum = sum * part + term;
  return sum * (Lanes)(((Integers)shifted + 127) << 23);
}

// Calls `use` with the first channel of each vector; the last one overlaps where channels are no multiple of LANES.
template <typename Use>
inline void for_vectors(int64_t channels, Use use) {
  for (int64_t channel = 0; channel < channels; channel += LANES) use(std::min(channel, channels - LANES));
}

// Of `count` values: their mean, and the sum of the squares of their deviations from it.
struct Moments {
  double count = 0, mean = 0, squares = 0;
  void add(const Moments& other) {  // Chan, Golub and LeVeque 1979
    const double all = count + other.count, distance = other.mean - mean;
    squares += other.squares + distance * distance * count * other.count / all;
    mean += distance * other.count / all;
    count = all;
  }
};

// The moments of rows [count][channels] by group. work: channels * 3.
template <typename Value>
void find_moments(const Value* rows, int64_t count, int64_t channels, int64_t groups, Moments* out, float* work) {
  constexpr int TOGETHER = 4;  // rows, for the latency of an addition
  float *const means = work, *const corrections = means + channels, *const squares = corrections + channels, share = 1.0f / count;
  for_vectors(channels, [&](int64_t channel) {
    const auto sum_of = [&](auto term) {
      Lanes sums[TOGETHER] = {};
      int64_t row = 0;
      for (; row + TOGETHER <= count; row += TOGETHER)
        for (int r = 0; r < TOGETHER; ++r) sums[r] += term(load(rows + (row + r) * channels + channel));
      for (; row < count; ++row) sums[0] += term(load(rows + row * channels + channel));
      return sums[0] + sums[1] + (sums[2] + sums[3]);
    };
    const Lanes mean = sum_of([](Lanes x) { return x; }) * share;
    store(means + channel, mean);
    store(corrections + channel, sum_of([&](Lanes x) { return x - mean; }) * share);
    store(squares + channel, sum_of([&](Lanes x) { return (x - mean) * (x - mean); }));
  });
  const auto mean_of = [&](int64_t channel) { return (double)means[channel] + corrections[channel]; };
  for (int64_t group = 0, of_group = channels / groups; group < groups; ++group) {
    Moments& all = out[group] = {(double)(count * of_group)};
    for (int64_t i = group * of_group; i < (group + 1) * of_group; ++i) all.mean += mean_of(i) / of_group;
    for (int64_t i = group * of_group; i < (group + 1) * of_group; ++i)
      all.squares += squares[i] + count * (mean_of(i) - all.mean) * (mean_of(i) - all.mean);
  }
}

inline Lanes silu(Lanes x) {
  const Lanes magnitude = x < 0.0f ? x : -x, power = power_of_two(magnitude * 1.44269504f);
  return x * (x < 0.0f ? power : Lanes{} + 1.0f) / (1.0f + power);
}

// x and out [images, positions, channels].
template <typename Value>
void normalise(const Value* x, const Value* weight, const Value* bias, Value* out, int64_t images, int64_t positions,
               int64_t channels, int64_t groups, double eps, bool with_silu) {
  const int64_t rows = std::max<int64_t>(NORMED_ROWS, NORMED / channels), blocks = (positions + rows - 1) / rows;
  const int64_t of_group = channels / groups;
  std::vector<Moments> moments(images * blocks * groups);
  const auto for_blocks = [&](auto use) {  // rows of a block that belong to one image
    torch::stable::parallel_for(0, images * blocks, 1, [&](int64_t first, int64_t last) {
      for (int64_t unit = first; unit < last; ++unit) {
        const int64_t begin = unit % blocks * rows;
        use(unit, (unit / blocks * positions + begin) * channels, std::min(rows, positions - begin));
      }
    });
  };
  for_blocks([&](int64_t unit, int64_t begin, int64_t count) {
    find_moments(x + begin, count, channels, groups, &moments[unit * groups], workspace(3 * channels));
  });
  std::vector<float> means(images * channels), factors(images * channels), terms(images * channels);
  torch::stable::parallel_for(0, images * groups, MERGED / blocks + 1, [&](int64_t first, int64_t last) {
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t image = unit / groups, group = unit % groups;
      Moments all;
      for (int64_t block = 0; block < blocks; ++block) all.add(moments[(image * blocks + block) * groups + group]);
      const double deviation = 1 / std::sqrt(all.squares / all.count + eps);
      const float mean = all.mean;
      for (int64_t channel = group * of_group; channel < (group + 1) * of_group; ++channel) {
        const int64_t at = image * channels + channel;
        const double factor = deviation * to_float(weight[channel]);
        means[at] = mean, factors[at] = factor, terms[at] = to_float(bias[channel]) + (mean - all.mean) * factor;
      }
    }
  });
  for_blocks([&](int64_t unit, int64_t begin, int64_t count) {
    const int64_t of_image = unit / blocks * channels;
    const float *const mean = &means[of_image], *const factor = &factors[of_image], *const term = &terms[of_image];
    for (int64_t at = begin; at < begin + count * channels; at += channels)
      for_vectors(channels, [&](int64_t channel) {
        // Before the product, in which a mean far from zero would lose digits.
        const Lanes centred = load(x + at + channel) - load(mean + channel);
        const Lanes value = centred * load(factor + channel) + load(term + channel);
        store(out + at + channel, with_silu ? silu(value) : value);
      });
  });
}

Tensor group_norm(Tensor x, Tensor weight, Tensor bias, int64_t groups, double eps, bool with_silu) {
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  const int64_t channels = x.dim() > 1 ? x.size(-1) : 0;
  const auto is_of_channels = [&](const Tensor& y) { return y.dim() == 1 && y.size(0) == channels && y.is_contiguous(); };
  STD_TORCH_CHECK(channels >= LANES && groups > 0 && channels % groups == 0 && is_of_channels(weight) && is_of_channels(bias),
                  "avx2_group_norm: fewer than ", LANES, " channels, or the shapes of input, weight and bias do not match");
  const auto all = [&](auto dtype) {
    return x.scalar_type() == dtype && weight.scalar_type() == dtype && bias.scalar_type() == dtype;
  };
  const auto compute = [&](auto value, int32_t dtype) {
    using Value = decltype(value);
    Tensor out = empty({x.sizes().begin(), x.sizes().end()}, dtype);
    if (out.numel())
      normalise((const Value*)x.data_ptr(), (const Value*)weight.data_ptr(), (const Value*)bias.data_ptr(),
                (Value*)out.data_ptr(), x.size(0), x.numel() / x.size(0) / channels, channels, groups, eps, with_silu);
    return out;
  };
#ifdef __AVX512BF16__
  if (all(torch::headeronly::ScalarType::BFloat16)) return compute(Bf16(), aoti_torch_dtype_bfloat16());
#endif
  STD_TORCH_CHECK(all(torch::headeronly::ScalarType::Float), "avx2_group_norm: computes in fp32, or with avx512_bf16 in bf16");
  return compute(float(), aoti_torch_dtype_float32());
}

// q and out [images, queries, heads, head], k and v [images, keys, heads, head]; strides of image, token and head of q, k, v
struct Heads {
  int64_t images, queries, keys, heads, head;
  const int64_t* strides[3];
  const float* of(const float* tensor, int index, int64_t item, int64_t token) const {
    return tensor + item / heads * strides[index][0] + token * strides[index][1] + item % heads * strides[index][2];
  }
};

// PANEL queries of one head, of which `count` exist. Scores and sums are transposed, [keys][PANEL] and [head][PANEL]: neither
// keys nor values are copied, and the softmax has a lane for each query. work: head * PANEL * 2 + KEYS * PANEL.
void attend(const float* q, const float* k, const float* v, float* out, int64_t count, const Heads& s, float* work) {
  const int64_t head = s.head, out_stride = s.heads * head;
  float *scaled = work, *sums = scaled + head * PANEL, *scores = sums + head * PANEL;
  const float scale = 1.44269504f / std::sqrt((float)head);  // of powers of two
  for (int64_t j = 0; j < head; ++j)
    for (int64_t i = 0; i < PANEL; ++i) scaled[j * PANEL + i] = i < count ? q[i * s.strides[0][1] + j] * scale : 0.0f;
  Lanes most[VECTORS], total[VECTORS] = {};
  for (Lanes& x : most) x = Lanes{} - std::numeric_limits<float>::infinity();
  const float* rows[std::max(KEYS, LARGEST_HEAD)];
  for (int64_t first = 0; first < s.keys; first += KEYS) {
    const int64_t keys = std::min<int64_t>(KEYS, s.keys - first);
    for (int64_t i = 0; i < keys; ++i) rows[i] = k + (first + i) * s.strides[1][1];
    multiply_all<CACHED>(rows, keys, 1, 0, head, 1, scaled, ZEROS, {scores, PANEL});
    Lanes(*const of_key)[VECTORS] = (Lanes(*)[VECTORS])scores;
    Lanes highest[VECTORS], factor[VECTORS];
    std::copy_n(most, VECTORS, highest);
    for (int64_t i = 0; i < keys; ++i)
      for (int lane = 0; lane < VECTORS; ++lane) highest[lane] = larger(highest[lane], of_key[i][lane]);
    for (int lane = 0; lane < VECTORS; ++lane) total[lane] *= factor[lane] = power_of_two(most[lane] - highest[lane]);
    for (int64_t i = 0; i < keys; ++i)
      for (int lane = 0; lane < VECTORS; ++lane)
        total[lane] += of_key[i][lane] = power_of_two(of_key[i][lane] - highest[lane]);
    std::copy_n(highest, VECTORS, most);
    for (int64_t j = 0; first && j < head; ++j)
      for (int lane = 0; lane < VECTORS; ++lane) ((Lanes*)(sums + j * PANEL))[lane] *= factor[lane];
    for (int64_t j = 0; j < head; ++j) rows[j] = v + first * s.strides[2][1] + j;
    multiply_all<STRIDED>(rows, head, 1, 0, keys, s.strides[2][1], scores, first ? nullptr : ZEROS, {sums, PANEL});
  }
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < head; ++j) out[i * out_stride + j] = sums[j * PANEL + i] / total[i / LANES][i % LANES];
}

Tensor attention(Tensor q, Tensor k, Tensor v) {
  STD_TORCH_CHECK(is_float(q) && is_float(k) && is_float(v) && q.dim() == 4 && q.size(3) <= LARGEST_HEAD,
                  "avx2_attention: computes in fp32 with head sizes of at most ", LARGEST_HEAD);
  bool match = k.dim() == 4 && v.dim() == 4 && k.numel() > 0 && k.size(1) == v.size(1);
  for (int i : {0, 2, 3}) match = match && q.size(i) == k.size(i) && q.size(i) == v.size(i);
  STD_TORCH_CHECK(match, "avx2_attention: the shapes of q, k and v do not match");
  for (Tensor* x : {&q, &k, &v})
    if (x->strides()[3] != 1) *x = torch::stable::contiguous(*x);
  const Heads s{q.size(0), q.size(1), k.size(1), q.size(2), q.size(3),
                {q.strides().data(), k.strides().data(), v.strides().data()}};
  Tensor out = empty({s.images, s.queries, s.heads, s.head}, aoti_torch_dtype_float32());
  const float *of_q = (const float*)q.data_ptr(), *of_k = (const float*)k.data_ptr(), *of_v = (const float*)v.data_ptr();
  float* const result = (float*)out.data_ptr();
  const int64_t panels = panels_of(s.queries);
  torch::stable::parallel_for(0, s.images * s.heads * panels, 1, [&](int64_t first, int64_t last) {
    float* const work = workspace((2 * s.head + KEYS) * PANEL);
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t item = unit / panels, begin = unit % panels * PANEL;
      attend(s.of(of_q, 0, item, begin), s.of(of_k, 1, item, 0), s.of(of_v, 2, item, 0),
             result + ((item / s.heads * s.queries + begin) * s.heads + item % s.heads) * s.head,
             std::min<int64_t>(PANEL, s.queries - begin), s, work);
    }
  });
  return out;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sd, CPU, library) {
  library.impl("avx2_layer", TORCH_BOX(&layer));
  library.impl("avx2_attention", TORCH_BOX(&attention));
  library.impl("avx2_group_norm", TORCH_BOX(&group_norm));
}
