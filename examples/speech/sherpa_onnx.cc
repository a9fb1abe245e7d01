// Transcribes a WAV file (16-bit, one channel) with sherpa-onnx and a folder of `kd speech export`.
//
// Headers and libraries come with sherpa-onnx's releases, and with its Python package (pip install sherpa-onnx):
//   S=$(python -c "import sherpa_onnx; print(sherpa_onnx.__path__[0])")
//   g++ -std=c++17 -D_GLIBCXX_USE_CXX11_ABI=0 -I$S/include sherpa_onnx.cc -o listen -L$S/lib -Wl,-rpath,$S/lib
//     -lsherpa-onnx-cxx-api -lsherpa-onnx-c-api -lonnxruntime
//   ./listen exported exported/self_test.wav
// -D is for the libraries of the Python package, which have the strings of old compilers; leave it out with others.
#include <cstdint>
#include <filesystem>
#include <iostream>
#include <string>
#include <vector>

#include "sherpa-onnx/c-api/cxx-api.h"

int main(int argc, char *argv[]) {
  using namespace sherpa_onnx::cxx;
  if (argc != 3) {
    std::cerr << "usage: listen FOLDER FILE.wav\n";
    return 2;
  }
  const std::string folder = argv[1];
  OnlineRecognizerConfig config;
  // an export may hold one of both alone
  const std::string int8 = folder + "/model.int8.onnx";
  config.model_config.nemo_ctc.model = std::filesystem::exists(int8) ? int8 : folder + "/model.onnx";
  config.model_config.tokens = folder + "/tokens.txt";
  config.model_config.num_threads = 1;
  OnlineRecognizer recognizer = OnlineRecognizer::Create(config);
  if (!recognizer.Get()) {
    std::cerr << folder << ": cannot be loaded\n";
    return 1;
  }
  const Wave wave = ReadWave(argv[2]);
  if (wave.samples.empty()) {
    std::cerr << argv[2] << ": is no 16-bit WAV file of one channel\n";
    return 1;
  }

  OnlineStream stream = recognizer.CreateStream();
  // a microphone calls this with each packet, then the loop below, and prints the result as it grows
  stream.AcceptWaveform(wave.sample_rate, wave.samples.data(), static_cast<int32_t>(wave.samples.size()));
  // silence behind a recording, or its last words are lost: 0.27 s and a chunk (kdsuite.json has its length) or more
  const std::vector<float> silence(wave.sample_rate);
  stream.AcceptWaveform(wave.sample_rate, silence.data(), static_cast<int32_t>(silence.size()));
  stream.InputFinished();
  while (recognizer.IsReady(&stream)) {
    recognizer.Decode(&stream);
  }
  std::cout << recognizer.GetResult(&stream).text << "\n";
  return 0;
}
